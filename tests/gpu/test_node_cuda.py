"""A node whose arena is a GPU's memory: the same bytes by every way, while blocks come, lose layers, move to the spill and go."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from crc32c import crc32c

from kvstore.arena import create
from kvstore.checked_copy import address_of
from tests.client_support import chain
from tests.integration import test_door
from tests.integration.test_door import fetch, same, stored

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")]
MIB = 1 << 20


def store(paths="local,tcp", arena=64 * MIB, **node):
    """A node on the GPU and a client that share metadata in process."""
    return test_door.store(paths, arena, node={"device": "cuda", **node})


@pytest.mark.parametrize("paths", ["", "tcp", "local", "local,tcp"])
@pytest.mark.parametrize(("count", "size"), [(100, 700), (12, 2 * MIB), (3, 9 * MIB)], ids=["small", "large", "larger"])
async def test_every_way_brings_the_same_bytes(paths, count, size):
    blocks = chain(count, size)
    async with store(paths) as (node, client):
        fetched = await fetch(client, await stored(client, blocks))
        assert same(fetched, blocks)
        assert node.engine.used_bytes == node.engine.table.pages * node.config.page_bytes > 0
        node.engine.check()


async def test_pressure_takes_layers_and_blocks_and_never_serves_wrong_bytes():
    async with store(arena=8 * MIB, policy="lru") as (node, client):
        chains = [chain(20, 100_000, 0.1, number=1000 * n) for n in range(5)]
        for blocks in chains:
            client.publish(blocks)
            assert await client.flush()
        await asyncio.sleep(0.2)
        found = 0
        for blocks in chains:
            hits = await client.lookup([block.header.key for block in blocks])
            for got, want in zip((await fetch(client, hits)).blocks, blocks, strict=False):
                present = got.header.present
                assert [bytes(p) for p in got.payload] == [bytes(p) for p in want.payload[:present]]
                found += 1
        assert found > 0
        node.engine.check()


async def test_what_leaves_the_gpu_is_found_in_host_memory():
    async with store(arena=4 * MIB, policy="lru", spill_host_bytes=64 * MIB) as (node, client):
        chains = [chain(8, 150_000, number=1000 * n) for n in range(5)]
        for blocks in chains:
            client.publish(blocks)
            assert await client.flush()
        assert node.engine.used_bytes <= 4 * MIB < sum(block.header.total_bytes for blocks in chains for block in blocks)
        for blocks in chains:
            assert same(await fetch(client, await stored(client, blocks)), blocks)


def test_copies_into_the_arena_are_checked_and_stay_in_their_pages():
    arena = create(1 << 20, "cuda", 4096)
    sources = [np.random.default_rng(n).integers(0, 256, size, dtype=np.uint8) for n, size in enumerate((5000, 100, 4096, 9000))]
    places, copies = (8192, 16_384, 20_480, 40_960), arena.copies()
    for place, source in zip(places, sources, strict=True):
        half = len(source) // 2
        copies.add(arena.address + place, address_of(source), half, False)
        copies.add(arena.address + place + half, address_of(source[half:]), len(source) - half, True)
    assert list(copies.make())[1::2] == [crc32c(source) for source in sources]
    for place, source in zip(places, sources, strict=True):
        assert arena.tensor[place : place + len(source)].cpu().numpy().tobytes() == source.tobytes()
    arena.close()
