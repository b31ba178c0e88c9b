"""Blocks through a node's door: the same bytes by every way, refused across users, and gRPC where the door fails."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import tracemalloc
from contextlib import asynccontextmanager

import pytest

from kvstore import door
from kvstore.client import ClientConfig, KvClient
from kvstore.client.door import open_door
from kvstore.client.shared import SharedMemory
from kvstore.credentials import Caller, Credentials
from kvstore.errors import ConcertinaError
from kvstore.metadata import InprocMetadata
from kvstore.node import inbox
from kvstore.node.config import NodeConfig
from kvstore.node.node import StoreNode
from tests.client_support import NAMESPACE, chain

MIB = 1 << 20


@asynccontextmanager
async def store(paths="local,tcp", arena=64 * MIB, credentials=None, node=None, **config):
    """A node and a client that share metadata in process; `node` are further options of the one, `config` of the other."""
    metadata = InprocMetadata()
    node = StoreNode(NodeConfig(arena=arena, heartbeat_s=0.05, **(node or {})), metadata)
    await node.start()
    if credentials:
        node.service.credentials = credentials
    client = KvClient(ClientConfig(paths=paths, refresh_s=0.05, **config), metadata=metadata)
    try:
        await client.start()
        yield node, client
    finally:
        await client.close()
        await node.stop()


async def stored(client, blocks):
    """Publish, and wait for the index."""
    client.publish(blocks)
    assert await client.flush()
    keys = [block.header.key for block in blocks]
    while len(hits := await client.lookup(keys)) < len(keys):
        await asyncio.sleep(0.02)
    return hits


async def fetch(client, hits, **options):
    return await client.fetch(hits, **{"namespace": NAMESPACE, "deadline_s": 10, **options})


def came_by(client):
    """Blocks by way."""
    return {way: int(n) for way in ("grpc", "local", "tcp") if (n := client.metrics.fetched_blocks.labels(way)._value.get())}


def same(fetched, blocks):
    return [b.to_bytes() for b in fetched.blocks] == [b.to_bytes() for b in blocks]


@pytest.mark.parametrize(("paths", "way"), [("", "grpc"), ("tcp", "tcp"), ("local", "local"), ("local,tcp", "local")])
@pytest.mark.parametrize(("count", "size"), [(100, 700), (12, 2 * MIB)], ids=["small", "large"])
async def test_every_way_brings_the_same_bytes(paths, way, count, size):
    blocks = chain(count, size)
    async with store(paths) as (node, client):
        hits = await stored(client, blocks)
        order = []
        fetched = await fetch(client, hits, on_block=lambda at, _: order.append(at))
        assert same(fetched, blocks) and order == list(range(count))
        assert came_by(client) == {way: count}
        await asyncio.sleep(0.3)  # the last lease is released after the last block has been handed on
        assert not len(node.engine.holds.leases)
        node.engine.check()


@pytest.mark.parametrize(("paths", "size", "asks"), [("local", 1000, 0), ("tcp", 1000, 2), ("local", 3 * MIB, 2)])
async def test_for_little_the_one_node_of_this_host_is_asked_and_not_the_index(monkeypatch, paths, size, asks):
    async with store(paths) as (node, client):
        blocks, locate, asked = chain(3, size), client._lookup.locate, []

        async def counted(keys):
            asked.append(keys)
            return await locate(keys)

        monkeypatch.setattr(client._lookup, "locate", counted)
        for _ in range(2):  # the second time they are there already
            assert client.publish(blocks) == 3 and await client.flush()
        assert len(asked) == asks
        assert all(node.engine.table.get(block.header.key) for block in blocks)
        assert not sum(client.metrics.publish_dropped.labels(why)._value.get() for why in ("no_room", "busy", "corrupt", "unavailable"))


@pytest.mark.parametrize("paths", ["tcp", "local"])
async def test_a_block_that_is_gone_cuts_the_prefix(paths):
    blocks = chain(20, 200_000)
    async with store(paths) as (node, client):
        hits = await stored(client, blocks)
        node.engine.evict([blocks[7].header.key])
        assert same(await fetch(client, hits), blocks[:7])
        assert same(await fetch(client, hits[:7]), blocks[:7])


@pytest.mark.parametrize("paths", ["tcp", "local"])
async def test_a_damaged_block_is_never_handed_on(paths):
    blocks = chain(9, 300_000)
    async with store(paths) as (node, client):
        hits = await stored(client, blocks)
        layers = node.engine.table.get(blocks[4].header.key).layers
        node.arena.write(layers[1], 1000, bytes([blocks[4].payload[1][1000] ^ 4]))
        assert same(await fetch(client, hits), blocks[:4])
        assert client.metrics.corrupt_blocks.labels("fetch")._value.get() == 1


@pytest.mark.parametrize("size", [3 * MIB, 7 * MIB], ids=["found", "asked for"])
async def test_a_block_that_goes_while_it_is_copied_is_a_miss(size, monkeypatch):
    """There is no lease, or it is over before the copy is."""
    blocks = chain(1, size)
    async with store("local") as (node, client):
        hits, loop, sound = await stored(client, blocks), asyncio.get_running_loop(), SharedMemory.sound

        async def evict():
            node.engine.holds._give_all(node.engine.holds.leases.expire(float("inf")))
            node.engine.evict([blocks[0].header.key])

        def late(self, marks):
            if threading.current_thread() is threading.main_thread():
                with pytest.raises(StopIteration):
                    evict().send(None)
            else:
                asyncio.run_coroutine_threadsafe(evict(), loop).result(5)
            return sound(self, marks)

        monkeypatch.setattr(SharedMemory, "sound", late)
        assert not (await fetch(client, hits)).blocks
        node.engine.check()


async def test_a_connection_that_rests_has_given_up_the_room_for_payloads():
    async with store("tcp") as (_, client):
        tracemalloc.start()
        try:
            await stored(client, chain(3, MIB))
            held = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, inbox.__file__)])
        finally:
            tracemalloc.stop()
        assert held.traces and max(trace.size for trace in held.traces) < inbox.LARGE_BYTES


async def test_the_door_is_refused_across_users(monkeypatch):
    blocks = chain(3, 1000)
    async with store("local") as (_, client):
        hits = await stored(client, blocks)
        client._doors.keep(set())
        mine = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: mine + 1)
        assert same(await fetch(client, hits), blocks)
        assert came_by(client) == {"grpc": 3}


async def test_a_node_in_another_place_is_not_asked_for_its_memory(monkeypatch):
    blocks = chain(3, 1000)
    async with store("local") as (_, client):
        client._doors._here = "another boot"
        assert same(await fetch(client, await stored(client, blocks)), blocks)
        assert came_by(client) == {"grpc": 3}


@pytest.mark.parametrize("here", [True, False])
async def test_the_door_asks_for_the_credential(here):
    async with store(credentials=Credentials({"0" * 64: Caller("team")})) as (node, _):
        for token in ("", "wrong"):
            with pytest.raises((ConcertinaError, OSError)):
                await asyncio.to_thread(open_door, node.record, here, token, 2.0)


@pytest.mark.parametrize(
    "request_", [b"", b"\xff" * 5, door.FRAME.pack(1 << 30, 7), door.message(door.Kind.PLAN, b"12"), b"\x05\x00\x00\x00\x63"]
)
async def test_what_is_no_request_ends_the_connection_and_nothing_else(request_):
    blocks = chain(3, 1000)
    async with store("tcp") as (node, client):
        hits = await stored(client, blocks)
        host, _, port = node.record.door.rpartition(":")

        def knock():
            with socket.create_connection((host, int(port)), timeout=5) as peer:
                peer.sendall(door.message(door.Kind.HELLO) + request_)
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(1 << 16):
                    pass

        await asyncio.to_thread(knock)
        assert same(await fetch(client, hits), blocks)


@pytest.mark.parametrize("paths", ["", "tcp", "local"])
async def test_a_fetch_is_bounded_in_bytes(paths):
    blocks = chain(10, 100_000)
    async with store(paths, fetch_bytes=4 * blocks[0].header.total_bytes + 100) as (_, client):
        fetched = await fetch(client, await stored(client, blocks))
        assert same(fetched, blocks[: len(fetched.blocks)]) and len(fetched.blocks) <= 4


async def test_a_closed_door_is_left_alone_and_grpc_goes_on():
    blocks = chain(4, 50_000)
    async with store() as (node, client):
        hits = await stored(client, blocks)
        await node._door.stop()
        client._doors.keep(set())
        assert same(await fetch(client, hits), blocks)
        assert came_by(client) == {"grpc": 4}
