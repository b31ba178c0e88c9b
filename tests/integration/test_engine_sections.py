"""A cached prefix is computed with from its lowest layers on, while the payload of the upper ones is under way from the store."""

from __future__ import annotations

import asyncio
from copy import deepcopy

import pytest

from kvstore.codecs import base
from kvstore.codecs.raw import RawCodec
from services.engine import reader
from services.engine.base import CacheMode
from tests import engine_support
from tests.engine_support import MemoryStore, answer, make_model, prompt, published, running, spec
from tests.integration.test_engine_layers import WAIT_S, filled, free

#: Five blocks of 16; the last is computed whatever is cached.
SHARED = prompt(80)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One with as many layers as a block has sections, and one more."""
    patch = pytest.MonkeyPatch()
    config = deepcopy(engine_support.FAMILIES["llama"])
    config.num_hidden_layers = 5
    patch.setitem(engine_support.FAMILIES, "llama", config)
    yield make_model("llama", tmp_path_factory.mktemp("llama"))
    patch.undo()


class Withholding(MemoryStore):
    """Gives the second and further sections when `go` is set, and fails them when `fails` is."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self.asked = asyncio.Event(), asyncio.Event()
        self.fails = False
        self.sections: list[int] = []

    async def get(self, address, request, timeout_s):
        self.sections.append(request.section)
        if request.section > 1:
            self.asked.set()
            await self.go.wait()
            if self.fails:
                raise OSError("the cable is out")
        async for message in super().get(address, request, timeout_s):
            yield message


@pytest.fixture(params=["raw", "int8"])
def codec(request, monkeypatch):
    monkeypatch.setattr(reader, "computes_beside", lambda device: True)
    monkeypatch.setattr(base, "SECTIONED_FROM_BYTES", 1)
    return request.param


async def waiting(store: Withholding) -> None:
    await asyncio.wait_for(store.asked.wait(), WAIT_S)


async def test_computing_begins_with_the_lowest_layers_and_ends_with_the_same_tokens(model, codec):
    store = Withholding()
    async with running(model, store, codec=codec) as engine:
        await filled(model, engine, store)
        store.go.set()
        want, last = await answer(engine, spec(SHARED, 6))
        assert (last.cache.cached_tokens, last.cache.blocks_hit) == (64, 4)
        store.go.clear()
        store.asked.clear()
        began, prefill = asyncio.Event(), engine._runner.prefill
        loop = asyncio.get_running_loop()

        def begins(tiles, between):
            loop.call_soon_threadsafe(began.set)
            return prefill(tiles, between)

        engine._runner.prefill = begins
        task = asyncio.create_task(answer(engine, spec(SHARED, 6)))
        await waiting(store)
        await asyncio.wait_for(began.wait(), WAIT_S)  # though the upper layers have not come
        await asyncio.sleep(0.1)
        assert not task.done()
        store.go.set()
        tokens, last = await task
        assert tokens == want and (last.cache.cached_tokens, last.cache.blocks_hit) == (64, 4)
        assert last.cache.bytes_fetched >= sum(b.header.total_bytes for b in store.blocks() if b.header.start < 64)
        assert set(store.sections) == {1, 2, 3, 4}
        await free(engine)


async def test_upper_layers_that_do_not_come_are_computed(model, codec):
    store = Withholding()
    async with running(model, store, codec=codec) as engine:
        want = await filled(model, engine, store)
        store.fails = True
        task = asyncio.create_task(answer(engine, spec(SHARED, 6)))
        await waiting(store)
        await asyncio.sleep(0.2)
        store.go.set()
        tokens, last = await task
        assert tokens == want and last.cache.cached_tokens == last.cache.blocks_hit == 0
        assert engine.metrics.store_unavailable.labels(part="engine")._value.get() == 1
        await free(engine)


async def test_a_request_that_is_cancelled_does_not_wait_for_its_upper_layers(model, codec):
    store = Withholding()
    async with running(model, store, codec=codec, store_floor_s=60.0, store_ceiling_s=60.0) as engine:
        await filled(model, engine, store)
        for seated in (False, True):
            store.asked.clear()
            task = asyncio.create_task(answer(engine, spec(SHARED, 6)))
            await waiting(store)
            await asyncio.sleep(0.3 * seated)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await free(engine)  # within ten seconds: the fetch alone would last for a minute
        async with asyncio.timeout(WAIT_S):
            while engine._seating._reader._fetching:
                await asyncio.sleep(0.01)


async def test_a_late_upper_layer_costs_time_and_no_answer(model, codec):
    """The store's deadline passes while the model waits in a layer."""
    store = Withholding()
    async with running(model, store, codec=codec) as engine:
        want = await filled(model, engine, store)
        tokens, last = await answer(engine, spec(SHARED, 6, store_deadline_s=0.5))
        assert tokens == want and last.cache.cached_tokens == 0
        await free(engine)


async def test_a_step_does_not_begin_with_layers_whose_others_are_slow(model, codec, monkeypatch):
    monkeypatch.setattr(reader, "HELD_S", 0.0)
    store = Withholding()
    async with running(model, store, codec=codec) as engine:
        want = await filled(model, engine, store)
        steps, prefill = [], engine._runner.prefill
        engine._runner.prefill = lambda tiles, between: steps.append(len(tiles)) or prefill(tiles, between)
        task = asyncio.create_task(answer(engine, spec(SHARED, 6)))
        await waiting(store)
        await asyncio.sleep(0.3)
        assert not steps and not task.done()
        store.go.set()
        tokens, last = await task
        assert len(tokens) == len(want) and last.cache.cached_tokens == 64
        await free(engine)


async def test_a_step_is_not_held_up_for_long(model, codec, monkeypatch):
    monkeypatch.setattr(reader, "MOST_HELD_S", 0.2)
    store = Withholding()
    async with running(model, store, codec=codec, store_floor_s=60.0, store_ceiling_s=60.0) as engine:
        want = await filled(model, engine, store)
        tokens, last = await asyncio.wait_for(answer(engine, spec(SHARED, 6)), WAIT_S)
        assert tokens == want and last.cache.cached_tokens == 0
        await free(engine)


async def test_of_a_long_prefix_only_the_last_blocks_come_by_sections(model, codec, monkeypatch):
    monkeypatch.setattr(reader, "LAST_BLOCKS", 3)
    store, long = Withholding(), prompt(16 * 9 + 4)
    store.go.set()
    async with running(model, store, codec=codec) as engine:
        bypass, _ = await answer(engine, spec(long, 6, cache_mode=CacheMode.BYPASS))
        await answer(engine, spec(long, 6))
        await published(engine, store, 9)
        store.sections.clear()
        tokens, last = await answer(engine, spec(long, 6))
        assert last.cache.blocks_hit == 9 and set(store.sections) == {0, 1, 2, 3, 4}
        if codec == RawCodec.name:
            assert tokens == bypass
        await free(engine)
