"""Several workers compute the same prompt: each block is encoded and put once."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from kvstore.client import ClientConfig, KvClient
from tests.engine_support import MemoryStore, answer, make_model, prompt, published, running, spec


class Together(MemoryStore):
    """Takes no block before both workers have asked for theirs, as if they were equally fast."""

    def __init__(self, asked: int) -> None:
        super().__init__()
        self._left, self._claim = asked, self.metadata.claim
        self._all = asyncio.Event()
        self.metadata.claim = self._count

    async def _count(self, keys, ttl_s):
        ours = await self._claim(keys, ttl_s)
        self._left -= len(keys)
        if self._left <= 0:
            self._all.set()
        return ours

    async def put(self, address, frames, timeout_s):
        await asyncio.wait_for(self._all.wait(), 20)
        return await super().put(address, frames, timeout_s)


async def test_a_block_is_encoded_and_put_once_over_all_workers(tmp_path):
    path, store = make_model("llama", tmp_path), Together(2 * 4)
    async with AsyncExitStack() as held:
        first = await held.enter_async_context(running(path, store, codec="int8"))
        store.client = KvClient(ClientConfig(), metadata=store.metadata, transport=store)
        second = await held.enter_async_context(running(path, store, codec="int8"))
        await asyncio.gather(*(answer(engine, spec(prompt(70), 1)) for engine in (first, second)))
        await published(first, store, 4)
        assert await second._client.flush(5)
        encoded = [engine.metrics.encode_seconds.labels(codec="int8")._sum.get() for engine in (first, second)]
        claims = store.metadata.state.claims
        async with asyncio.timeout(5):
            while claims:
                await asyncio.sleep(0.01)
    assert len(store.blocks()) == 4 and sorted(encoded)[0] == 0 < sorted(encoded)[1]
