"""Blocks of a node on the same host, read by its catalogue: the node is not asked, only told."""

from __future__ import annotations

import asyncio
import signal

import pytest

from kvstore.client.door import AT_ONCE_BLOCKS, AT_ONCE_BYTES, Door
from tests.client_support import chain
from tests.integration.test_door import came_by, fetch, same, store, stored
from tests.integration.test_door_again import COUNT, SIZE, apart


@pytest.fixture
def asked(monkeypatch):
    """Blocks of each question to a node."""
    counts, ask = [], Door.ask

    def counted(self, keys, *args):
        counts.append(len(keys))
        ask(self, keys, *args)

    monkeypatch.setattr(Door, "ask", counted)
    return counts


async def uses(node, blocks):
    """Once the node has been told."""
    await asyncio.sleep(0.2)
    return [node.engine.table.get(block.header.key).last_use for block in blocks]


async def test_new_blocks_are_found_and_the_node_is_told_of_their_use(asked):
    blocks = chain(COUNT, SIZE)
    async with store("local") as (node, client):
        hits = await stored(client, blocks)
        before, requests = await uses(node, blocks), node.engine.requests.count
        fetched = await fetch(client, hits[:8])
        assert same(fetched, blocks[:8]) and fetched.bytes_fetched == sum(block.header.total_bytes for block in blocks[:8])
        assert not asked and came_by(client) == {"local": 8}
        after = await uses(node, blocks)
        assert [new > old for new, old in zip(after, before, strict=True)] == [True] * 8 + [False] * (COUNT - 8)
        assert node.engine.requests.count == requests + 1
        node.engine.check()


@pytest.mark.parametrize(("count", "size"), [(AT_ONCE_BLOCKS + 1, 1000), (2, AT_ONCE_BYTES // 2 + 1)])
async def test_much_is_asked_for(asked, count, size):
    blocks = chain(count, size)
    async with store("local") as (_, client):
        assert same(await fetch(client, await stored(client, blocks)), blocks)
        assert sum(asked) == count


async def test_what_is_larger_than_the_index_said_is_asked_for(asked):
    blocks = chain(2, AT_ONCE_BYTES)
    async with store("local") as (_, client):
        hits = [hit._replace(size_bytes=1000) for hit in await stored(client, blocks)]
        assert same(await fetch(client, hits), blocks)
        assert asked == [2]


async def test_a_node_that_does_not_answer_is_still_read(tmp_path):
    async with apart(tmp_path) as (node, client, hits, blocks):
        node.process.send_signal(signal.SIGSTOP)
        for _ in range(3):
            assert same(await fetch(client, hits, deadline_s=1.0), blocks)
        node.process.send_signal(signal.SIGCONT)


async def test_a_dead_nodes_memory_is_left_as_soon_as_its_connection_is_seen_to_be_gone(tmp_path):
    async with apart(tmp_path) as (node, client, hits, blocks):
        node.process.kill()
        await node.process.wait()
        async with asyncio.timeout(5):
            while (fetched := await fetch(client, hits)).blocks:
                assert same(fetched, blocks)  # they are what they were
                await asyncio.sleep(0.02)
        assert not client._doors._idle.get(hits[0].node.incarnation)


@pytest.mark.parametrize("spoil", ["tag", "header", "run", "length"])
async def test_whatever_a_row_says_the_bytes_are_right(asked, spoil):
    """As when the node writes it in that moment."""
    blocks = chain(COUNT, SIZE)
    async with store("local") as (node, client):
        hits = await stored(client, blocks)
        catalogue = node._door._catalogue
        said = [catalogue.find([block.header.key]) for block in blocks]
        wrong = bytearray(said[3])
        if spoil == "tag":
            wrong = bytearray(said[4])
        elif spoil == "header":
            wrong[60] ^= 1
        elif spoil == "run":
            wrong[-32:-16] = said[4][-32:-16]
        else:
            del wrong[-5:]
        catalogue.note(blocks[3].header.key, bytes(wrong))
        assert same(await fetch(client, hits), blocks)
        assert asked == [COUNT] and client.metrics.corrupt_blocks.labels("fetch")._value.get() == 0


async def test_a_run_outside_the_memory_is_no_run(asked):
    blocks = chain(3, SIZE)
    async with store("local") as (node, client):
        hits = await stored(client, blocks)
        catalogue = node._door._catalogue
        said = bytearray(catalogue.find([blocks[1].header.key]))
        said[7:15] = (1 << 60).to_bytes(8, "little")  # the place of its mark
        catalogue.note(blocks[1].header.key, bytes(said))
        assert same(await fetch(client, hits), blocks) and asked == [3]


async def test_blocks_of_a_tenant_are_not_in_it(asked):
    """A key means another block to each of them."""
    blocks = chain(3, SIZE)
    async with store("local") as (node, client):
        hits = await stored(client, blocks)
        for entry in node.engine.table:
            node._door._catalogue.note(entry.key, b"")
            entry.owner, entry.description = "team", (0, b"")
        assert same(await fetch(client, hits), blocks)
        assert same(await fetch(client, hits), blocks)
        assert asked == [3, 3]


async def test_what_was_put_by_another_way_is_found_once_it_was_asked_for(asked):
    blocks = chain(COUNT, SIZE)
    async with store("local") as (node, client):
        hits = await stored(client, blocks)
        for entry in node.engine.table:  # as after a put over gRPC
            entry.description = (0, b"")
            node._door._catalogue.note(entry.key, b"")
        assert same(await fetch(client, hits), blocks) and asked == [COUNT]
        assert same(await fetch(client, hits), blocks) and asked == [COUNT]
