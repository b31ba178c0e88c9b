"""The client against real store nodes and a real Valkey: round trips, spread, and what happens when parts die."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest

from kvstore.block import BlockHeader
from kvstore.client import ClientConfig, KvClient
from kvstore.errors import NotFoundError
from kvstore.identity import digest
from kvstore.metadata.embedded import start_valkey
from kvstore.node import NodeConfig, StoreNode
from tests.client_support import NAMESPACE, chain

MIB = 1 << 20


@pytest.fixture
def valkey(tmp_path):
    server = start_valkey(tmp_path)
    yield server
    server.stop()


@asynccontextmanager
async def cluster(url: str, nodes: int = 2, arena: int = 64 * MIB, **config):
    """A client and `nodes` store nodes in this process."""
    async with AsyncExitStack() as stack:
        running = []
        for i in range(nodes):
            node = StoreNode(NodeConfig(redis=url, arena=arena, id=f"node-{i}", drain_s=0.2))
            await node.start()
            stack.push_async_callback(node.stop)
            running.append(node)
        client = KvClient(ClientConfig(redis_url=url, **config))
        await client.start()
        stack.push_async_callback(client.close)
        yield client, running


@asynccontextmanager
async def node_process(url: str, arena: int):
    """A store node in a process of its own, so that it can be killed. Yields its process."""
    program = f"from kvstore.node.node import run, NodeConfig; raise SystemExit(run(NodeConfig(redis={url!r}, arena={arena})))"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    try:
        assert json.loads(await asyncio.wait_for(process.stdout.readline(), 60))["ready"]
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
            process.kill()
        await process.wait()


async def stored(client: KvClient, blocks, hits: int | None = None) -> list[bytes]:
    """Publish `blocks` and wait until the index knows them. Returns their keys."""
    assert client.publish(blocks, input_tokens=4 * len(blocks)) == len(blocks)
    assert await client.flush(20)
    keys = [b.header.key for b in blocks]
    await until(lambda: client.lookup(keys), lambda found: len(found) == (len(keys) if hits is None else hits))
    return keys


async def until(probe, good, timeout_s: float = 15.0):
    """Await `probe` again and again until `good` of its result."""
    async with asyncio.timeout(timeout_s):
        result = await probe()
        while not good(result):
            await asyncio.sleep(0.02)
            result = await probe()
    return result


def count(client, name, *labels):
    metric = getattr(client.metrics, name)
    return (metric.labels(*labels) if labels else metric)._value.get()


@pytest.mark.parametrize(("count", "size"), [(64, 500), (32, 100_000), (20, 3 * MIB)], ids=["small", "100 kB", "several frames"])
async def test_published_blocks_are_fetched_bit_for_bit_and_a_prompt_from_one_node(valkey, count, size):
    async with cluster(valkey.url, arena=96 * MIB) as (client, nodes):
        holders = []
        for number in range(2):
            blocks = chain(count, size, number=number)
            hits = await client.lookup(await stored(client, blocks))
            holders.append({h.node.id for h in hits})
            assert [h.size_bytes for h in hits] == [b.header.total_bytes for b in blocks]
            fetched = await client.fetch(hits, namespace=NAMESPACE, deadline_s=20, input_tokens=16)
            assert [b.to_bytes() for b in fetched.blocks] == [b.to_bytes() for b in blocks]
        assert sorted(holders, key=sorted) == [{"node-0"}, {"node-1"}]  # the second prompt goes where there is more room
        assert [n.record.blocks for n in nodes] == [count, count]


async def test_two_thousand_keys_are_looked_up_in_one_round_trip(valkey):
    blocks = chain(2000, 20)
    async with cluster(valkey.url) as (client, _):
        keys = await stored(client, blocks)
        shards = client.metadata.shards
        counts = []
        for _ in range(3):  # the membership is read beside it, in at most two round trips
            before = shards.round_trips
            assert len(await client.lookup(keys, deadline_s=5)) == 2000
            counts.append(shards.round_trips - before)
        assert min(counts) == 1


async def test_another_namespace_never_hits(valkey):
    async with cluster(valkey.url) as (client, _):
        keys = await stored(client, chain(3))
        hits = await client.lookup(keys)
        assert (await client.fetch(hits, namespace=digest(b"another tenant"))).blocks == []
        assert len((await client.fetch(hits, namespace=NAMESPACE)).blocks) == 3


async def test_a_damaged_payload_in_the_arena_is_a_counted_miss(valkey):
    blocks = chain(4, 50_000)
    async with cluster(valkey.url, nodes=1) as (client, (node,)):
        keys = await stored(client, blocks)
        pages = node.engine.table.get(keys[2]).layers[0]
        node.arena.write(pages, 100, bytes([blocks[2].payload[0][100] ^ 1]))
        fetched = await client.fetch(await client.lookup(keys), namespace=NAMESPACE)
        assert [b.header.key for b in fetched.blocks] == keys[:2]
        assert count(client, "corrupt_blocks", "fetch") == 1


async def test_evicted_blocks_leave_the_index(valkey):
    async with cluster(valkey.url) as (client, _):
        keys = await stored(client, chain(6))
        assert await client.admin.evict([keys[3], bytes(32)]) == ["OK", "NOT_FOUND"]
        await until(lambda: client.lookup(keys), lambda hits: len(hits) == 3)
        assert (await client.admin.clear())[0] == 5
        await until(lambda: client.lookup(keys), lambda hits: not hits)


async def test_administration_over_all_nodes(valkey):
    blocks = chain(8, 3000)
    async with cluster(valkey.url) as (client, nodes):
        keys = await stored(client, blocks)
        assert [n.id for n in client.nodes()] == ["node-0", "node-1"]
        stats = [await client.admin.stats(n) for n in client.nodes()]
        assert sum(s.blocks for s in stats) == 8
        assert sum(s.stored_bytes for s in stats) == sum(b.header.total_bytes for b in blocks)
        assert all(s.used_bytes + s.free_bytes + s.reserved_bytes == s.arena_bytes for s in stats)
        listed = []
        for node in client.nodes():
            page = await client.admin.list(node, limit=3)
            listed += page.blocks
            while page.next:
                page = await client.admin.list(node, after=page.next, limit=3)
                listed += page.blocks
        assert sorted(b.key for b in listed) == sorted(keys)
        assert await client.admin.pin(keys[:2], 60) == ["OK", "OK"]
        assert await client.admin.evict(keys[:3]) == ["BUSY", "BUSY", "OK"]
        assert await client.admin.unpin(keys[:1]) == ["OK"]
        assert (await client.admin.clear(digest(b"nobody")))[0] == 0
        assert (await client.admin.clear(NAMESPACE))[0] == 6
        assert client.admin.node("node-1").address == nodes[1].address
        with pytest.raises(NotFoundError, match="node-0, node-1"):
            client.admin.node("node-7")


@pytest.mark.parametrize("paths", ["", "tcp", "local,tcp"])
async def test_a_node_killed_in_the_middle_of_a_get_leaves_a_whole_prefix(valkey, paths, monkeypatch):
    monkeypatch.setattr("kvstore.client.door.BATCH_GROWTH", 1)  # a plan that the node made outlives it, as its memory does
    monkeypatch.setattr("kvstore.client.door.FIRST_BATCH_BYTES", 1)
    blocks = chain(24, 2 * MIB)
    async with node_process(valkey.url, 128 * MIB) as process, cluster(valkey.url, nodes=0, paths=paths) as (client, _):
        keys = await stored(client, blocks)
        hits = await client.lookup(keys)

        def kill(position, _):
            if position == 1 and process.returncode is None:
                os.kill(process.pid, signal.SIGKILL)

        fetched = await asyncio.wait_for(client.fetch(hits, namespace=NAMESPACE, deadline_s=5, on_block=kill), 10)
        assert 2 <= len(fetched.blocks) < 24
        assert [b.to_bytes() for b in fetched.blocks] == [b.to_bytes() for b in blocks[: len(fetched.blocks)]]
        assert await client.lookup(keys) == []  # left alone at once; dead for everybody when its last beat is 2.25 s old
        await until(client.metadata.nodes, lambda nodes: not nodes)
        await until(lambda: client.lookup(keys), lambda hits: not hits)


async def test_a_node_that_stands_still_costs_its_deadline_once(valkey):
    """Where it has to be asked: not for a few blocks in memory that it shares."""
    async with node_process(valkey.url, 32 * MIB) as process, cluster(valkey.url, nodes=0, paths="tcp") as (client, _):
        keys = await stored(client, chain(4, 10_000))
        hits = await client.lookup(keys)
        process.send_signal(signal.SIGSTOP)
        assert (await asyncio.wait_for(client.fetch(hits, namespace=NAMESPACE, deadline_s=0.3), 5)).blocks == []
        assert count(client, "store_unavailable", "node") >= 1
        assert await client.lookup(keys) == []
        process.send_signal(signal.SIGCONT)
        await until(lambda: client.lookup(keys), lambda found: len(found) == 4)
        assert len((await client.fetch(hits, namespace=NAMESPACE)).blocks) == 4


async def test_redis_lost_and_back_is_a_miss_and_then_all_blocks_again(tmp_path):
    first = start_valkey(tmp_path / "a")
    try:
        async with cluster(first.url, refresh_s=0.1) as (client, _):
            blocks = chain(6)
            keys = await stored(client, blocks)
            hits = await client.lookup(keys)
            first.process.kill()
            first.process.wait()
            assert await asyncio.wait_for(client.lookup(keys), 5) == []
            assert count(client, "store_unavailable", "redis") >= 1
            assert len((await client.fetch(hits, namespace=NAMESPACE)).blocks) == 6  # the data path does without
            second = start_valkey(tmp_path / "b", first.port)
            try:
                await until(lambda: client.lookup(keys), lambda found: len(found) == 6)
                more = chain(8)
                await stored(client, more)
            finally:
                second.stop()
    finally:
        first.stop()


async def test_a_redis_that_stands_still_costs_one_timeout(tmp_path):
    server = start_valkey(tmp_path)
    try:
        async with cluster(server.url, refresh_s=0.1, redis_timeout_s=0.2) as (client, _):
            keys = await stored(client, chain(3))
            os.kill(server.pid, signal.SIGSTOP)
            try:
                assert await client.lookup(keys, deadline_s=5) == []
                before = client.metadata.shards.round_trips
                for _ in range(50):
                    assert await client.lookup(keys, deadline_s=5) == []
                assert client.metadata.shards.round_trips - before <= 1  # the background probe
            finally:
                os.kill(server.pid, signal.SIGCONT)
            await until(lambda: client.lookup(keys), lambda found: len(found) == 3)
    finally:
        server.stop()


async def test_a_full_cluster_goes_on_taking_new_blocks(valkey):
    async with cluster(valkey.url, arena=2 * MIB) as (client, nodes):
        for number in range(6):
            blocks = chain(10, 100_000, number=number)
            assert client.publish(blocks) == 10
            assert await client.flush(20)
        assert all(n.record.blocks > 5 for n in nodes)
        assert all(n.record.used_bytes <= n.record.arena_bytes for n in nodes)
        header = BlockHeader.from_bytes(blocks[0].to_bytes())
        assert header.total_bytes * 60 > 2 * 2 * MIB  # more than fits
