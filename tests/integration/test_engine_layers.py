"""A cached prefix is computed with from its lowest layers on, while the upper ones are decoded."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from kvstore.codecs.raw import RawCodec
from kvstore.errors import CorruptBlockError
from services.engine import core, reader
from services.engine.base import CacheMode
from services.engine.coming import Coming
from tests.engine_support import MemoryStore, answer, make_model, prompt, published, running, spec

#: Five blocks of 16; the last is computed whatever is cached.
SHARED, LAST_START = prompt(80), 48
WAIT_S = 10.0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("llama"))


class Layers:
    """Codec `raw` made to decode layer by layer: of the last blocks, before each layer above the first, it waits for `go`."""

    def __init__(self, monkeypatch) -> None:
        self.waits, self.go = threading.Event(), threading.Event()
        self.fails = False
        monkeypatch.setattr(reader, "computes_beside", lambda device: True)
        monkeypatch.setattr(RawCodec, "layerwise", True)
        decode, layers = RawCodec._decode, self

        def by_layers(codec, blocks, tokens, k, v, on_layers):
            whole = [torch.empty_like(x) for x in (k, v)]
            decode(codec, blocks, tokens, *whole)
            for x in (k, v):
                x.fill_(float("nan"))  # whoever looks too early will show it
            for layer in range(codec.layout.layers):
                if layer and blocks[-1].start == LAST_START:
                    layers.waits.set()
                    assert layers.go.wait(WAIT_S)
                    if layers.fails:
                        raise CorruptBlockError("an upper layer is damaged")
                for x, y in zip((k, v), whole, strict=True):
                    x[:, layer] = y[:, layer]
                on_layers(layer + 1)

        monkeypatch.setattr(RawCodec, "_decode_by_layers", by_layers)

    async def waiting(self) -> None:
        """Until the decoder waits for leave to go on."""
        assert await asyncio.to_thread(self.waits.wait, WAIT_S)


@pytest.fixture
def layers(monkeypatch):
    return Layers(monkeypatch)


async def free(engine) -> None:
    """Until no page is held."""
    pages = engine._runner.pool.pages
    async with asyncio.timeout(WAIT_S):
        while pages.free < pages.total:
            await asyncio.sleep(0.01)
    assert pages.check()
    assert not engine._seating._prefixes._live and not engine._seating._prefixes._coming


async def filled(model, engine, store) -> list[int]:
    """What the engine answers; its prompt's blocks are in the store."""
    tokens, _ = await answer(engine, spec(SHARED, 6))
    await published(engine, store, 5)
    return tokens


@pytest.mark.parametrize("scattered", [False, True])
async def test_computing_begins_with_the_first_layer_and_ends_with_the_same_tokens(model, layers, monkeypatch, scattered):
    asked, store, wait = threading.Event(), MemoryStore(), Coming.wait

    def waits(self, layer, meanwhile=None):
        if layer:
            asked.set()  # the model has come to a layer that is not there
        wait(self, layer, meanwhile)

    monkeypatch.setattr(Coming, "wait", waits)
    async with running(model, store, codec="raw") as engine:
        want = await filled(model, engine, store)
        pages = engine._runner.pool.pages
        held = []
        if scattered:  # every second page is somebody's: a request's pages do not lie in a row
            everything = pages.take(pages.total)
            held = everything[::2]
            pages.give(everything[1::2])
        task = asyncio.create_task(answer(engine, spec(SHARED, 6)))
        await layers.waiting()
        assert await asyncio.to_thread(asked.wait, WAIT_S)
        assert not task.done()
        layers.go.set()
        tokens, last = await task
        assert (tokens, last.cache.cached_tokens, last.cache.blocks_hit) == (want, 64, 4)
        pages.give(held)
        await free(engine)


async def test_layers_that_are_lost_after_all_are_computed_and_nobody_else_is_hurt(model, layers):
    store = MemoryStore()
    async with running(model, store, codec="raw") as engine:
        want = await filled(model, engine, store)
        other = spec(prompt(70, seed=5), 6, cache_mode=CacheMode.BYPASS)
        alone = (await answer(engine, other))[0]
        layers.fails = True
        task = asyncio.create_task(answer(engine, spec(SHARED, 6)))
        await layers.waiting()
        beside = asyncio.create_task(answer(engine, other))
        await asyncio.sleep(0.05)
        layers.go.set()
        tokens, last = await task
        assert tokens == want and last.cache.cached_tokens == last.cache.blocks_hit == 0
        assert (await beside)[0] == alone
        assert engine.metrics.corrupt_blocks.labels(where="decode")._value.get() == 1
        await free(engine)


async def test_pages_are_not_given_back_while_they_are_written_to(model, layers):
    store = MemoryStore()
    async with running(model, store, codec="raw") as engine:
        want = await filled(model, engine, store)
        pages = engine._runner.pool.pages
        for seated in (False, True):
            layers.waits.clear()
            layers.go.clear()
            task = asyncio.create_task(answer(engine, spec(SHARED, 6)))
            await layers.waiting()
            await asyncio.sleep(0.2 * seated)
            task.cancel()
            await asyncio.sleep(0.05)
            assert pages.free < pages.total
            layers.go.set()
            await asyncio.gather(task, return_exceptions=True)
            await free(engine)
        assert (await answer(engine, spec(SHARED, 6)))[0] == want


async def test_others_are_given_the_blocks_when_all_layers_are_there(model, layers):
    store = MemoryStore()
    async with running(model, store, codec="raw") as engine:
        want = await filled(model, engine, store)
        first = asyncio.create_task(answer(engine, spec(SHARED, 6)))
        await layers.waiting()
        second = asyncio.create_task(answer(engine, spec(SHARED, 6)))
        await asyncio.sleep(0.05)
        assert not engine._seating._prefixes._live
        layers.go.set()
        (one, _), (two, last) = await asyncio.gather(first, second)
        assert one == two == want and last.cache.cached_tokens == 64 and last.cache.bytes_fetched == 0
        await free(engine)


async def test_streams_go_on_while_a_layer_is_waited_for(model, layers, monkeypatch):
    monkeypatch.setattr(core, "PREFILL_SLICE", 0.0)  # it is always time
    store = MemoryStore()
    async with running(model, store, codec="raw") as engine:
        want = await filled(model, engine, store)
        stream = engine.generate(spec(prompt(20, seed=9), 400, cache_mode=CacheMode.BYPASS))
        await anext(stream)
        task = asyncio.create_task(answer(engine, spec(SHARED, 6)))
        await layers.waiting()
        async with asyncio.timeout(WAIT_S):
            for _ in range(20):
                await anext(stream)
        assert not task.done()
        layers.go.set()
        assert (await task)[0] == want
        await stream.aclose()
        await free(engine)
