"""Blocks that are read again are copied from where they lay before the node has said that they still lie there; its word counts.
Few of them, and few that are put, without waking a thread."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from contextlib import asynccontextmanager

import pytest

from kvstore.client import ClientConfig, KvClient, line
from kvstore.client.door import AT_ONCE_BLOCKS, Door
from kvstore.client.planned import Plan
from kvstore.client.shared import SharedMemory
from kvstore.client.staging import Stage
from kvstore.metadata.embedded import start_valkey
from kvstore.node.status import Status
from tests.client_support import NAMESPACE, chain
from tests.integration.test_door import came_by, fetch, same, store, stored
from tests.integration.test_node_lives import node as node_process

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
        await asyncio.sleep(0.3)
        uses = node.engine.table.get(blocks[0].header.key).last_use
        await fetch(client, hits)
        await asyncio.sleep(0.3)
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
        assert same(await fetch(client, hits), blocks)
        assert len(copied) == 2  # never where they were: their marks are not theirs any more


@pytest.fixture
def asking(monkeypatch):
    """As if the catalogue of no node had all that is wanted."""
    monkeypatch.setattr(SharedMemory, "planned", lambda self, keys: None)


async def test_what_was_guessed_wrong_is_copied_once_more(asking, copied, monkeypatch):
    """As when blocks move between the guess and the node's answer."""
    monkeypatch.setattr(SharedMemory, "guess", lambda self, keys: self._plans.get((keys[-1], len(keys))))
    blocks, others = chain(COUNT, SIZE), chain(COUNT, SIZE, number=5000)
    async with store("local") as (node, client):
        hits = await stored(client, blocks)
        assert same(await fetch(client, hits), blocks)
        await evict(node, *blocks)
        await stored(client, others)
        hits = await stored(client, blocks)
        del copied[:]
        assert same(await fetch(client, hits), blocks)
        assert len(copied) == 2
        await evict(node, blocks[7])
        assert same(await fetch(client, hits), blocks[:7])
        assert client.metrics.corrupt_blocks.labels("fetch")._value.get() == 0


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


async def given_back(client):
    """Until no thread has a connection any more."""
    async with asyncio.timeout(10):
        while not any(client._doors._idle.values()):
            await asyncio.sleep(0.01)


@asynccontextmanager
async def apart(tmp_path):
    """A node in a process of its own, which answers while this one copies, and a client that has read blocks of it; and the blocks."""
    blocks, server = chain(COUNT, SIZE), start_valkey(tmp_path / "valkey")
    client = KvClient(ClientConfig(redis_url=server.url, paths="local"))
    try:
        async with node_process(server.url, "--arena", "64MiB") as process:
            await client.start()
            hits = await stored(client, blocks)
            assert same(await fetch(client, hits), blocks)
            await given_back(client)
            yield process, client, hits, blocks
    finally:
        await client.close()
        server.stop()


@pytest.fixture
def threads(monkeypatch):
    """Of each batch that was copied, whose thread did it."""
    threads, copy_all = [], Door._copy_all

    def noted(self, *args):
        threads.append(threading.current_thread())
        return copy_all(self, *args)

    monkeypatch.setattr(Door, "_copy_all", noted)
    return threads


async def test_little_is_copied_without_waking_a_thread(asking, tmp_path, monkeypatch, threads):
    copy = Plan.copy

    def slow(self, *args):
        time.sleep(0.1)  # so that the node has answered
        return copy(self, *args)

    async with apart(tmp_path) as (_, client, hits, blocks):
        monkeypatch.setattr(Plan, "copy", slow)
        for _ in range(2):
            assert same(await fetch(client, hits), blocks)
        assert threads[-2:] == [threading.main_thread()] * 2
        await asyncio.sleep(0.2)
        assert await client.admin.evict([blocks[7].header.key]) == ["OK"]
        for _ in range(2):
            assert same(await fetch(client, hits), blocks[:7])
        assert came_by(client) == {"local": 3 * COUNT + 2 * 7}


async def test_few_blocks_are_read_for_the_first_time_without_waking_a_thread_and_many_are_not(asking, tmp_path, monkeypatch, threads):
    monkeypatch.setattr(line, "SOON_MS", 1000)  # the node's answer comes within it, however busy the machine
    async with apart(tmp_path) as (_, client, *_):
        for number, (count, is_device) in enumerate(((AT_ONCE_BLOCKS, False), (AT_ONCE_BLOCKS + 1, False), (COUNT, True)), 1):
            blocks = chain(count, 2000, number=10_000 * number)
            hits = await stored(client, blocks)
            monkeypatch.setattr(SharedMemory, "is_device", is_device)  # a GPU's memory is waited for, which a thread does
            assert same(await fetch(client, hits), blocks)
            await given_back(client)
        assert [thread is threading.main_thread() for thread in threads[-3:]] == [True, False, False]


async def test_little_is_put_without_waking_a_thread(tmp_path, monkeypatch):
    threads, write = [], Stage.write

    def noted(self, *args):
        threads.append(threading.current_thread())
        return write(self, *args)

    async with apart(tmp_path) as (_, client, *_):
        monkeypatch.setattr(Stage, "write", noted)
        for number, size in enumerate((SIZE, 2_000_000), 1):
            blocks = chain(COUNT, size, number=10_000 * number)
            assert same(await fetch(client, await stored(client, blocks)), blocks)
            await given_back(client)
        assert [thread is threading.main_thread() for thread in threads] == [True, False]


async def without_a_pause(asked):
    """The outcome of a call that may take as long as it likes, but not hold up what else is to be done."""
    turns = 0
    while not asked.done():
        await asyncio.sleep(0.01)
        turns += 1
    assert turns >= 5
    return asked.result()


async def test_a_node_that_does_not_answer_holds_nobody_up(asking, tmp_path):
    async with apart(tmp_path) as (node, client, hits, blocks):
        node.process.send_signal(signal.SIGSTOP)
        assert not (await without_a_pause(asyncio.create_task(fetch(client, hits, deadline_s=1.0)))).blocks
        client.publish(chain(COUNT, SIZE, number=5000))
        assert not await without_a_pause(asyncio.create_task(client.flush(1.0)))
        node.process.send_signal(signal.SIGCONT)
        async with asyncio.timeout(20):  # the client has given the node up for a while
            while not same(await fetch(client, hits), blocks):
                await asyncio.sleep(0.1)
