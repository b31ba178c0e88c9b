"""The live cache as requests see it: shared prefixes, and requests that give way and go on."""

from __future__ import annotations

import asyncio

import pytest

from services.engine import core
from services.engine.base import CacheMode
from tests.engine_support import MemoryStore, answer, make_model, prompt, published, running, spec

SHARED = prompt(80)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("llama"))


def prefilled(engine) -> list[int]:
    """Notes how many tiles each step computes."""
    steps, whole = [], engine._runner.prefill
    engine._runner.prefill = lambda tiles, between: (steps.append(len(tiles)), whole(tiles, between))[1]
    return steps


async def test_requests_of_one_prefix_at_once_compute_it_once(model):
    requests = [spec(SHARED + prompt(20, seed=s), 60) for s in (1, 2, 3)]  # the first must not be done before the last has come
    async with running(model) as engine:
        alone = [await answer(engine, request) for request in requests]
        steps = prefilled(engine)
        together = await asyncio.gather(*(answer(engine, request) for request in requests))
        assert engine._runner.pool.pages.free == engine._runner.pool.pages.total
    assert [tokens for tokens, _ in together] == [tokens for tokens, _ in alone]
    assert sum(steps) == 7 + 2 + 2
    assert sorted(last.cache.cached_tokens for _, last in together) == [0, 80, 80]


async def test_pages_in_use_are_counted_once_and_outlive_their_first_owner(model):
    async with running(model) as engine:
        pages = engine._runner.pool.pages
        first = engine.generate(spec(SHARED, 300))
        await anext(first)
        alone = pages.total - pages.free
        second = engine.generate(spec(SHARED + prompt(3, seed=1), 40))
        await anext(second)
        assert pages.total - pages.free <= alone + 4
        await first.aclose()
        rest = [token async for delta in second for token in delta.tokens]
        want, _ = await answer(engine, spec(SHARED + prompt(3, seed=1), 40, cache_mode=CacheMode.BYPASS))
    assert rest == want[1:]


async def test_a_prefix_on_its_way_from_the_store_is_fetched_once(model):
    store = MemoryStore()
    async with running(model, store, codec="int8") as engine:
        await answer(engine, spec(SHARED, 1))
        await published(engine, store, 5)
        requests = [spec(SHARED + prompt(9, seed=s), 4, cache_mode=CacheMode.READ_ONLY) for s in (1, 2)]
        lasts = [last for _, last in await asyncio.gather(*(answer(engine, r) for r in requests))]
        assert [last.cache.cached_tokens for last in lasts] == [80, 80]
        assert [last.cache.bytes_fetched > 0 for last in lasts] == [True, False]
        assert lasts[1].cache.distortion == lasts[0].cache.distortion > 0


async def test_a_request_that_bypasses_the_cache_shares_nothing(model):
    async with running(model) as engine:
        one, other = await asyncio.gather(*(answer(engine, spec(SHARED, 20, cache_mode=CacheMode.BYPASS)) for _ in range(2)))
    assert one[0] == other[0]
    assert one[1].cache.cached_tokens == other[1].cache.cached_tokens == 0


@pytest.mark.parametrize("codec", ["", "raw", "int8"])
async def test_the_latest_gives_way_when_pages_run_out_and_goes_on_as_if_it_had_not(model, codec):
    requests = [spec(prompt(30, seed=s), 60, temperature=t, seed=s) for s, t in ((1, 0.0), (2, 0.9), (3, 0.0))]
    async with running(model) as engine:
        alone = [(await answer(engine, request))[0] for request in requests]
    store = MemoryStore() if codec else None
    async with running(model, store, codec=codec or "raw", max_live_tokens=12 * 16) as engine:
        steps = prefilled(engine)
        together = await asyncio.gather(*(answer(engine, request) for request in requests))
        assert engine._runner.pool.pages.check()
    assert [tokens for tokens, _ in together] == alone
    assert sum(steps) > 6 or codec == "raw"  # somebody was computed anew
    assert all(last.completion_tokens == 60 for _, last in together)


async def test_a_request_with_a_press_gives_way_and_goes_on_too(model):
    requests = [spec(prompt(40, seed=s), 50, press=press, kv_tokens=32) for s, press in ((1, ""), (2, "h2o"), (3, "tova"))]
    async with running(model) as engine:
        alone = [(await answer(engine, request))[0] for request in requests]
    async with running(model, max_live_tokens=9 * 16) as engine:
        together = await asyncio.gather(*(answer(engine, request) for request in requests))
    assert [tokens for tokens, _ in together] == alone


async def test_cancelled_requests_give_their_pages_back_whatever_they_wait_for(model):
    store = MemoryStore()
    async with running(model, store, codec="raw", max_batch=1) as engine:
        await answer(engine, spec(SHARED, 1))
        await published(engine, store, 5)
        store.stuck_at = {store.blocks()[2].header.key}
        tasks = [asyncio.create_task(answer(engine, spec(SHARED + prompt(9, seed=s), 100))) for s in range(5)]
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        store.stuck_at = set()
        tokens, _ = await answer(engine, spec(SHARED, 5))
        pages = engine._runner.pool.pages
        async with asyncio.timeout(5):
            while pages.free < pages.total:
                await asyncio.sleep(0.01)
    assert len(tokens) == 5
    assert not engine._seating._prefixes._live and not engine._seating._prefixes._coming


async def test_streams_go_on_in_the_middle_of_a_prefill_step(model, monkeypatch):
    monkeypatch.setattr(core, "PREFILL_SLICE", 0.0)  # it is always time
    async with running(model) as engine:
        want, _ = await answer(engine, spec(prompt(30), 60))
        late = spec(prompt(400, seed=1), 3, cache_mode=CacheMode.BYPASS)
        want_late, _ = await answer(engine, late)
        steps, whole = [], engine._runner.decode
        engine._runner.decode = lambda rows: (steps.append("decode"), whole(rows))[1]
        prefill = engine._runner.prefill
        engine._runner.prefill = lambda tiles, between: (steps.append("("), prefill(tiles, between), steps.append(")"))[1]
        stream = engine.generate(spec(prompt(30), 60, cache_mode=CacheMode.BYPASS))
        first = await anext(stream)
        task = asyncio.create_task(answer(engine, late))
        rest = [token async for delta in stream for token in delta.tokens]
        assert (await task)[0] == want_late
    assert first.tokens + rest == want
    assert "(decode" in "".join(steps)
