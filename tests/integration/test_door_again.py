"""Blocks that are read again are copied from where they lay before the node has said that they still lie there. Its word counts."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.client.shared import SharedMemory
from kvstore.node.status import Status
from tests.client_support import NAMESPACE, chain
from tests.integration.test_door import came_by, fetch, same, store, stored

COUNT, SIZE = 12, 100_000


@pytest.fixture
def copied(monkeypatch):
    """Rows of each copy out of a node's memory."""
    counts, copy = [], SharedMemory.copy

    def counted(self, rows):
        counts.append(len(rows))
        copy(self, rows)

    monkeypatch.setattr(SharedMemory, "copy", counted)
    return counts


async def evict(node, *blocks):
    """Once nobody reads them any more."""
    async with asyncio.timeout(5):
        while len(node.engine.holds.leases):
            await asyncio.sleep(0.01)
    assert node.engine.evict([block.header.key for block in blocks]) == [Status.OK] * len(blocks)


async def test_what_lies_where_it_lay_is_copied_once(copied):
    blocks = chain(COUNT, SIZE)
    async with store("local") as (node, client):
        hits = await stored(client, blocks)
        for _ in range(3):
            assert same(await fetch(client, hits), blocks)
        assert len(copied) == 3 and len(set(copied)) == 1
        assert came_by(client) == {"local": 3 * COUNT}
        assert same(await fetch(client, hits[:5]), blocks[:5])
        uses = node.engine.table.get(blocks[0].header.key).last_use
        await asyncio.sleep(0.01)
        await fetch(client, hits)
        assert node.engine.table.get(blocks[0].header.key).last_use > uses  # the node hears of each use
        await asyncio.sleep(0.3)
        assert not len(node.engine.holds.leases)


async def test_a_block_that_went_in_between_cuts_the_prefix():
    blocks = chain(COUNT, SIZE)
    async with store("local") as (node, client):
        hits = await stored(client, blocks)
        assert same(await fetch(client, hits), blocks)
        await evict(node, blocks[7])
        for _ in range(2):
            assert same(await fetch(client, hits), blocks[:7])


async def test_blocks_that_lie_elsewhere_now_are_found_there(copied):
    blocks, others = chain(COUNT, SIZE), chain(COUNT, SIZE, number=5000)
    async with store("local") as (node, client):
        hits = await stored(client, blocks)
        before = node.engine.table.get(blocks[0].header.key).layers
        assert same(await fetch(client, hits), blocks)
        await evict(node, *blocks)
        assert same(await fetch(client, await stored(client, others)), others)  # in the pages of the first
        hits = await stored(client, blocks)
        assert node.engine.table.get(blocks[0].header.key).layers != before
        del copied[:]
        assert same(await fetch(client, hits), blocks)
        assert len(copied) == 2  # where they were, in vain, and where they are
        assert same(await fetch(client, hits), blocks)
        assert len(copied) == 3


async def test_a_block_that_lost_fidelity_comes_with_what_is_left():
    blocks = chain(COUNT, SIZE)
    async with store("local") as (node, client):
        hits = await stored(client, blocks)
        assert same(await fetch(client, hits), blocks)
        node.engine._demote(node.engine.table.get(blocks[3].header.key), 1)
        found = (await fetch(client, hits, max_distortion=1.0)).blocks
        assert [block.header.present for block in found] == [2, 2, 2, 1] + 8 * [2]
        wanted = [block.truncate(came.header.present) for block, came in zip(blocks, found, strict=True)]
        assert [block.to_bytes() for block in found] == [block.to_bytes() for block in wanted]


async def test_damage_that_came_in_between_is_never_handed_on():
    blocks = chain(COUNT, SIZE)
    async with store("local") as (node, client):
        hits = await stored(client, blocks)
        assert same(await fetch(client, hits), blocks)
        layers = node.engine.table.get(blocks[4].header.key).layers
        node.arena.write(layers[1], 1000, bytes([blocks[4].payload[1][1000] ^ 4]))
        assert same(await fetch(client, hits), blocks[:4])
        assert client.metrics.corrupt_blocks.labels("fetch")._value.get() == 1


async def test_a_block_that_is_not_wanted_any_more_ends_the_prefix():
    blocks = chain(COUNT, SIZE, distortion=0.2)
    async with store("local") as (_, client):
        hits = await stored(client, blocks)
        assert same(await fetch(client, hits), blocks)
        assert not (await fetch(client, hits, max_distortion=0.1)).blocks
        assert not (await client.fetch(hits, namespace=bytes(32), deadline_s=10)).blocks
        assert same(await client.fetch(hits, namespace=NAMESPACE, deadline_s=10), blocks)
