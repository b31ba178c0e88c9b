"""How the engine treats requests: sampling, stopping, leaving, waiting, and life without a store."""

from __future__ import annotations

import asyncio
import time

import pytest

from kvstore.errors import CapacityError, DeadlineError, InvalidInputError, TransportError
from services.engine.base import CacheMode
from tests.client_support import NODES
from tests.engine_support import MemoryStore, answer, make_model, prompt, published, running, spec


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("llama"))


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_seed_gives_the_same_sample_in_any_batch(model):
    request = spec(prompt(20), 12, temperature=1.5, top_p=0.9, seed=11)
    async with running(model) as engine:
        alone, _ = await answer(engine, request)
        crowd = [answer(engine, spec(prompt(9, seed=s), 20, temperature=1.0)) for s in range(3)]
        (again, _), *_ = await asyncio.gather(answer(engine, request), *crowd)
        other, _ = await answer(engine, spec(prompt(20), 12, temperature=1.5, top_p=0.9, seed=12))
        unseeded = {tuple((await answer(engine, spec(prompt(20), 12, temperature=1.5)))[0]) for _ in range(3)}
    assert alone == again != other
    assert len(unseeded) > 1


async def test_a_sample_that_broke_off_goes_on_as_it_would_have(model):
    """A new request whose prompt holds the tokens that came makes the draws that the first one would have made next."""
    sampling = {"temperature": 1.5, "top_p": 0.9, "seed": 11}
    async with running(model) as engine:
        whole, _ = await answer(engine, spec(prompt(20), 16, **sampling))
        rest, _ = await answer(engine, spec(prompt(20) + tuple(whole[:6]), 10, **sampling))
    assert rest == whole[6:]


async def test_a_stop_string_ends_the_answer_and_is_not_in_it(model):
    async with running(model) as engine:
        _, whole = await answer(engine, spec(prompt(20), 40))
        at = len(whole.text) // 2
        stop = whole.text[at : at + 2]
        tokens, last = await answer(engine, spec(prompt(20), 40, stop=(stop,)))
    assert last.text == whole.text[: whole.text.find(stop)]
    assert last.finish_reason == "stop" and whole.finish_reason == "length"
    assert len(tokens) == last.completion_tokens < whole.completion_tokens == 40


async def test_the_end_token_ends_the_answer_unless_it_is_ignored(model):
    async with running(model) as engine:
        tokens, _ = await answer(engine, spec(prompt(20), 30))
        engine._core._eos = frozenset({tokens[4]})
        short, last = await answer(engine, spec(prompt(20), 30, ignore_eos=False))
        ignored, _ = await answer(engine, spec(prompt(20), 30))
    assert short == tokens[: tokens.index(tokens[4]) + 1] and last.finish_reason == "stop"
    assert ignored == tokens


async def test_the_answer_ends_with_the_context_window(model):
    async with running(model, max_context=64) as engine:
        tokens, last = await answer(engine, spec(prompt(60), 100))
        assert len(tokens) == 4 and last.finish_reason == "length"
        with pytest.raises(InvalidInputError, match="at most 63 fit"):
            await answer(engine, spec(prompt(64), 1))


@pytest.mark.parametrize(
    ("tokens", "new", "press", "says"),
    [((), 1, "", "empty"), ((5, 320), 1, "", "0 to 319"), ((5,), 0, "", "max_new_tokens"), ((5,), 1, "squeeze", "unknown press")],
)
async def test_impossible_requests_are_refused(model, tokens, new, press, says):
    async with running(model) as engine:
        with pytest.raises(InvalidInputError, match=says):
            await answer(engine, spec(tokens, new, press=press, kv_tokens=100))


async def test_closing_the_iterator_frees_the_slot(model):
    async with running(model, max_batch=1, max_queue=1) as engine:
        deltas = engine.generate(spec(prompt(10), 400))
        await anext(deltas)
        assert len(engine._core._jobs) == 1
        waiting = asyncio.create_task(answer(engine, spec(prompt(10), 3)))
        await asyncio.sleep(0.05)
        with pytest.raises(CapacityError):
            await anext(engine.generate(spec(prompt(10), 3)))
        await deltas.aclose()
        tokens, _ = await waiting
        assert len(tokens) == 3
        await until(lambda: not engine._core._jobs and not engine._core._scheduler.running)
        assert engine._active == 0 and engine.metrics.live_kv_bytes._value.get() == 0


async def test_a_cancelled_caller_frees_the_slot(model):
    async with running(model) as engine:
        task = asyncio.create_task(answer(engine, spec(prompt(10), 450)))
        await until(lambda: engine._core._jobs)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not engine._core._jobs)
        assert engine._active == 0


async def test_a_deadline_ends_the_request(model):
    async with running(model) as engine:
        with pytest.raises(DeadlineError):
            await answer(engine, spec(prompt(10), 490, deadline=time.monotonic() + 0.05))
        with pytest.raises(DeadlineError):
            await answer(engine, spec(prompt(10), 1, deadline=time.monotonic() - 1))
        await until(lambda: not engine._core._jobs)
        assert len((await answer(engine, spec(prompt(10), 2)))[0]) == 2


async def test_stop_ends_running_requests_as_cancelled(model):
    async with running(model) as engine:
        task = asyncio.create_task(answer(engine, spec(prompt(10), 480)))
        await until(lambda: engine._core._jobs)
        await engine.stop()
        _, last = await task
        assert last.finish_reason == "cancelled"
        with pytest.raises(CapacityError):
            await answer(engine, spec(prompt(10), 1))


async def test_a_step_that_fails_ends_its_requests_and_no_others(model):
    async with running(model) as engine:
        whole = engine._runner.prefill

        def broken(tiles, between):
            engine._runner.prefill = whole
            raise MemoryError("no room")

        engine._runner.prefill = broken
        with pytest.raises(Exception, match="MemoryError"):
            await answer(engine, spec(prompt(10), 4))
        assert len((await answer(engine, spec(prompt(10), 4)))[0]) == 4


async def test_a_store_that_is_away_costs_no_answer(model):
    store = MemoryStore()
    async with running(model, store) as engine:
        want, _ = await answer(engine, spec(prompt(50), 5))
        await published(engine, store, 3)
        store.stuck_at = {store.blocks()[1].header.key}
        tokens, last = await answer(engine, spec(prompt(50), 5, store_deadline_s=0.4))
        assert tokens == want and last.cache.cached_tokens == 16
        store.stuck_at, store.fail = set(), {node.address: TransportError("gone") for node in NODES}
        tokens, last = await answer(engine, spec(prompt(50), 5))
        assert tokens == want and last.cache.cached_tokens == 0


async def test_what_of_the_store_a_request_may_use(model):
    store = MemoryStore()
    async with running(model, store, codec="raw") as engine:
        for mode in (CacheMode.BYPASS, CacheMode.READ_ONLY):
            await answer(engine, spec(prompt(50), 3, cache_mode=mode))
        await asyncio.sleep(0.1)
        assert not store.blocks()
        await answer(engine, spec(prompt(50), 3))
        await published(engine, store, 3)
        hits = {}
        for mode in CacheMode:
            hits[mode] = (await answer(engine, spec(prompt(50), 3, cache_mode=mode)))[1].cache.cached_tokens
        other = (await answer(engine, spec(prompt(50), 3, tenant="other", cache_mode=CacheMode.READ_ONLY)))[1].cache.cached_tokens
    assert hits == {CacheMode.USE: 48, CacheMode.READ_ONLY: 48, CacheMode.BYPASS: 0}
    assert other == 0


async def test_at_least_the_last_token_is_computed(model):
    store = MemoryStore()
    async with running(model, store, codec="raw") as engine:
        want, _ = await answer(engine, spec(prompt(48), 5))
        await published(engine, store, 3)
        tokens, last = await answer(engine, spec(prompt(48), 5))
    assert tokens == want and last.cache.cached_tokens == 32


async def test_generated_blocks_are_published_by_lossy_codecs_only(model):
    for codec, count in (("raw", 1), ("int8", 3)):
        store = MemoryStore()
        async with running(model, store, codec=codec) as engine:
            answered, _ = await answer(engine, spec(prompt(20), 40))
            await published(engine, store, count)
            turn = prompt(20) + tuple(answered) + prompt(10, seed=1)
            _, last = await answer(engine, spec(turn, 2))
        assert last.cache.cached_tokens == count * 16


async def test_blocks_computed_on_a_lossy_prefix_carry_it_as_provenance(model):
    store = MemoryStore()
    async with running(model, store, codec="int8") as engine:
        await answer(engine, spec(prompt(32), 1))
        await published(engine, store, 2)
        assert all(block.header.provenance.exact for block in store.blocks())
        longer = prompt(32) + prompt(32, seed=1)
        _, last = await answer(engine, spec(longer, 1))
        await published(engine, store, 4)
        worst = max(max(b.distortion[1].keys, b.distortion[1].values) for b in store.blocks()[:2])
        assert last.cache.cached_tokens == 32 and last.cache.distortion == pytest.approx(worst)
        late = [block.header.provenance for block in store.blocks()[2:]]
        assert all(max(p.distortion.keys, p.distortion.values) == pytest.approx(worst) and p.fidelity == 1 for p in late)
        _, strict = await answer(engine, spec(longer, 1, max_distortion=worst / 2))
        assert strict.cache.cached_tokens < 32


async def test_live_tokens_are_bounded_over_all_requests(model):
    async with running(model, max_live_tokens=96) as engine:
        with pytest.raises(InvalidInputError, match=r"more than this worker.s 96"):
            await answer(engine, spec(prompt(90), 20))
        answers = await asyncio.gather(*(answer(engine, spec(prompt(30, seed=s), 30)) for s in range(3)))
        assert all(len(tokens) == 30 for tokens, _ in answers)
        assert engine._runner.pool.pages.free == 6 and engine._runner.pool.pages.check()
