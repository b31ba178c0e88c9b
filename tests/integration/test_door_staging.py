"""Puts through memory that node and client share: the same blocks as over the connection, and no writer spoils more than its own."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace

import numpy as np
import pytest

from kvstore import door
from kvstore.arena import Arena
from kvstore.block import EncodedBlock
from kvstore.checked_copy import Copies
from kvstore.client.door import open_door
from kvstore.client.line import map_memory
from kvstore.client.staging import Stage
from kvstore.door import Kind
from kvstore.errors import TransportError
from kvstore.node import staging
from kvstore.node.status import Status
from tests.client_support import chain
from tests.integration.test_door import MIB, fetch, store, stored


def guest_of(node):
    """A door on this host with memory to write into, and that memory."""
    guest = open_door(node.record, True, "", 2.0)
    guest.deadline = time.monotonic() + 10.0
    guest.send([door.message(Kind.STAGE)])
    size, descriptor, _ = guest.receive_memory(Kind.STAGED)
    return guest, map_memory(descriptor, size, writable=True) if size else None


def offer(*parts: bytes) -> bytes:
    """Pieces whose payloads are there already."""
    return door.message(Kind.OFFER, *parts) + door.message(Kind.FILLED)


def piece_of(block, offset: int, memory) -> bytes:
    """One block written at `offset`, as an OFFER says it."""
    payload, header = np.frombuffer(b"".join(block.payload), np.uint8), block.header.to_bytes()
    memory[offset : offset + len(payload)] = payload
    return door.OFFER.pack(0, offset, len(payload), len(header)) + header


def resident_bytes(view: memoryview) -> int:
    """Of memory that this process maps, how much it has in its page table."""
    start = f"{np.frombuffer(view, np.uint8).ctypes.data:x}-"
    with open("/proc/self/smaps") as maps:
        for line in maps:
            if line.startswith(start):
                return next(int(row.split()[1]) << 10 for row in maps if row.startswith("Rss:"))
    raise LookupError(start)


@pytest.mark.parametrize(("count", "size"), [(7, 100), (100, 70_000), (7, 3 * MIB), (7, 5 * MIB), (2, staging.STAGE_BYTES + 1)])
async def test_blocks_that_are_put_on_the_same_host_come_back_as_they_were(count: int, size: int) -> None:
    async with store(arena=128 * MIB) as (node, client):
        blocks = chain(count, size=size)
        guest = await asyncio.to_thread(open_door, node.record, True, "", 30.0)
        for expected in (Status.OK, Status.ALREADY_EXISTS):
            assert await asyncio.to_thread(guest.write, [(block, 0) for block in blocks], 60.0) == bytes([expected] * count)
        assert guest._stage.open
        guest.close()
        fetched = await fetch(client, await stored(client, blocks))
        assert [b"".join(block.payload) for block in fetched.blocks] == [b"".join(block.payload) for block in blocks]


async def test_an_idle_node_leaves_the_pages_of_the_memory_to_the_guest_and_what_is_put_later_is_right() -> None:
    async with store(arena=64 * MIB) as (node, client):
        blocks, later = chain(4, size=2 * MIB), chain(4, size=2 * MIB, number=100)
        guest = await asyncio.to_thread(open_door, node.record, True, "", 30.0)
        for part in (blocks, later):
            assert await asyncio.to_thread(guest.write, [(block, 0) for block in part], 60.0) == bytes([Status.OK] * 4)
            (inside,) = node._door._guests
            before = resident_bytes(inside._stage._view)
            node._door.relax()
            assert before >= 8 * MIB > 0 == resident_bytes(inside._stage._view)
        guest.close()
        for part in (blocks, later):
            fetched = await fetch(client, await stored(client, part))
            assert [b"".join(block.payload) for block in fetched.blocks] == [b"".join(block.payload) for block in part]


async def test_a_guest_that_leaves_or_stands_still_within_a_block_leaves_nothing_behind() -> None:
    async with store() as (node, _):
        (block,) = chain(1, size=4000)
        header = block.header.to_bytes()
        for leaves in (True, False):
            node.engine.config = replace(node.engine.config, put_timeout_s=0.2)
            guest, _ = await asyncio.to_thread(guest_of, node)
            await asyncio.to_thread(guest.send, [offer(door.OFFER.pack(0, 0, 1000, len(header)), header)])
            assert bytes(await asyncio.to_thread(guest.receive, Kind.STATUSES)) == b""
            assert node.engine.reserved_bytes
            if leaves:
                guest.close()
            while node.engine.reserved_bytes:
                await asyncio.sleep(0.02)
            guest.close()


async def test_the_copy_is_checked_and_not_what_a_writer_makes_of_the_original(monkeypatch) -> None:
    async with store() as (node, _):
        guest, memory = await asyncio.to_thread(guest_of, node)
        (block,) = chain(1, size=4000)
        right = np.frombuffer(b"".join(block.payload), np.uint8)

        def late(of, name):
            whole = getattr(of, name)

            def copy(*args):
                outcome = whole(*args)
                memory[: len(right)] = right
                return outcome

            monkeypatch.setattr(of, name, copy)

        late(Arena, "write")
        late(Copies, "make")
        header = block.header.to_bytes()
        request = offer(door.OFFER.pack(0, 0, len(right), len(header)), header)
        for expected in (Status.DATA_LOSS, Status.OK):  # by the second time the right bytes are there
            await asyncio.to_thread(guest.send, [request])
            assert bytes(await asyncio.to_thread(guest.receive, Kind.STATUSES)) == bytes([expected])
            assert (node.engine.table.get(block.header.key) is not None) == (expected is Status.OK)
            assert node.engine.reserved_bytes == 0
        guest.close()


async def test_blocks_without_a_payload_are_not_stored_and_the_policy_hears_of_them() -> None:
    async with store() as (node, _):
        guest = await asyncio.to_thread(open_door, node.record, True, "", 30.0)
        blocks = chain(6, size=4000)
        told = [EncodedBlock.build(replace(block.header, rows=block.header.rows[:1]), (b"",)) for block in blocks]
        mixed = [*blocks[:3], *told[3:5], blocks[5]]
        outcome = [Status.OK] * 3 + [Status.DATA_LOSS] * 2 + [Status.OK]
        assert list(await asyncio.to_thread(guest.write, [(block, 4) for block in mixed], 60.0)) == outcome
        assert all(node.engine.policy._ghosts.find(block.header.key) for block in told[3:5])
        node.engine.check()
        guest.close()


async def test_of_blocks_that_come_together_each_gets_what_it_deserves() -> None:
    async with store() as (node, _):
        guest, memory = await asyncio.to_thread(guest_of, node)
        blocks = chain(8, size=4000)
        there = await asyncio.to_thread(guest._write_stream, [(blocks[3], 0)])
        assert there == bytes([Status.OK])
        parts = []
        for number, block in enumerate([*blocks, blocks[6]]):
            header, payload = bytearray(block.header.to_bytes()), b"".join(block.payload)
            memory[number * 8192 : number * 8192 + len(payload)] = np.frombuffer(payload, np.uint8)
            memory[number * 8192] ^= number == 1  # damaged: a payload, and a header
            header[20] ^= number == 5
            parts += [door.OFFER.pack(0, number * 8192, len(payload), len(header)), bytes(header)]
        await asyncio.to_thread(guest.send, [offer(*parts)])
        outcome = [Status.OK] * 8 + [Status.ALREADY_EXISTS]
        outcome[1], outcome[3], outcome[5] = Status.DATA_LOSS, Status.ALREADY_EXISTS, Status.DATA_LOSS
        assert list(await asyncio.to_thread(guest.receive, Kind.STATUSES)) == outcome
        node.engine.check()
        assert node.engine.reserved_bytes == 0
        for number, block in enumerate(blocks):
            entry = node.engine.table.get(block.header.key)
            assert (entry is None) == (number in (1, 5))
            assert entry is None or b"".join(node._payload(entry)) == b"".join(block.payload)
        guest.close()


async def test_parts_are_taken_as_they_are_said_to_be_there() -> None:
    """One answer comes for all."""
    async with store() as (node, _):
        guest, memory = await asyncio.to_thread(guest_of, node)
        blocks = chain(6, size=4000)
        for first, stop, kind in ((0, 2, Kind.PART), (2, 5, Kind.PART), (5, 6, Kind.FILLED)):
            pieces = [piece_of(block, number * 8192, memory) for number, block in enumerate(blocks[first:stop], first)]
            await asyncio.to_thread(guest.send, [door.message(Kind.OFFER, *pieces), door.message(kind)])
            async with asyncio.timeout(10):
                while len(node.engine._writing) + len(node.engine.table) < stop:
                    await asyncio.sleep(0.01)
            assert len(node.engine.table) == (6 if kind is Kind.FILLED else 0)
        assert bytes(await asyncio.to_thread(guest.receive, Kind.STATUSES)) == bytes([Status.OK] * 6)
        node.engine.check()
        for block in blocks:
            assert b"".join(node._payload(node.engine.table.get(block.header.key))) == b"".join(block.payload)
        guest.close()


async def test_a_guest_that_leaves_between_two_parts_leaves_what_was_whole() -> None:
    async with store() as (node, _):
        guest, memory = await asyncio.to_thread(guest_of, node)
        (block,) = chain(1, size=4000)
        await asyncio.to_thread(guest.send, [door.message(Kind.OFFER, piece_of(block, 0, memory)), door.message(Kind.PART)])
        guest.close()
        async with asyncio.timeout(10):
            while not node.engine.table.get(block.header.key):
                await asyncio.sleep(0.01)
        node.engine.check()
        assert node.engine.reserved_bytes == 0


async def test_offers_that_are_none_end_the_connection() -> None:
    async with store() as (node, _):
        (block,) = chain(1, size=4000)
        header = block.header.to_bytes()
        for parts in (
            [door.OFFER.pack(0, staging.STAGE_BYTES - 1, 2, len(header)), header],
            [door.OFFER.pack(0, 2**64 - 1, 4000, len(header)), header],
            [door.OFFER.pack(0, 0, 2**64 - 1, len(header)), header],
            [door.OFFER.pack(0, 0, 4000, len(header) + 1), header],
            [door.OFFER.pack(0, 0, 4000, 0)],
            [b"short"],
            door.message(Kind.FILLED),
            door.message(Kind.PART),
            door.message(Kind.OFFER, door.OFFER.pack(0, 0, 4000, len(header)), header) + 2 * door.message(Kind.PART),
            2 * door.message(Kind.OFFER, door.OFFER.pack(0, 0, 4000, len(header)), header),
        ):
            guest, _ = await asyncio.to_thread(guest_of, node)
            await asyncio.to_thread(guest.send, [offer(*parts) if isinstance(parts, list) else parts])
            with pytest.raises(OSError):
                await asyncio.to_thread(guest.receive, Kind.STATUSES)
            guest.close()
        assert node.engine.reserved_bytes == 0


async def test_the_node_gives_memory_to_few_and_takes_it_back(monkeypatch) -> None:
    monkeypatch.setattr(staging, "MAX_STAGES", 1)
    async with store() as (node, _):
        first, memory = await asyncio.to_thread(guest_of, node)
        second, none = await asyncio.to_thread(guest_of, node)
        assert memory is not None
        assert none is None
        first.close()
        second.close()
        while True:
            third, memory = await asyncio.to_thread(guest_of, node)
            third.close()
            if memory is not None:
                break
            await asyncio.sleep(0.02)


async def test_nobody_can_take_the_memory_from_under_the_node() -> None:
    async with store() as (node, _):
        guest = await asyncio.to_thread(open_door, node.record, True, "", 2.0)
        guest.deadline = time.monotonic() + 10.0
        await asyncio.to_thread(guest.send, [door.message(Kind.STAGE)])
        _, descriptor, _ = await asyncio.to_thread(guest.receive_memory, Kind.STAGED)
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)
        guest.close()


async def test_memory_is_not_for_those_who_come_by_tcp() -> None:
    async with store() as (node, _):
        guest = await asyncio.to_thread(open_door, node.record, False, "", 2.0)
        guest.deadline = time.monotonic() + 10.0
        with pytest.raises(TransportError):
            await asyncio.to_thread(Stage.ask, guest)
        guest.close()
