"""Puts through memory that node and client share: the same blocks as over the connection, and no writer spoils more than its own."""

from __future__ import annotations

import asyncio
import os
import time

import numpy as np
import pytest

from kvstore import door
from kvstore.arena import Arena
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
    size, descriptor = guest.receive_memory(Kind.STAGED)
    return guest, map_memory(descriptor, size, writable=True) if size else None


@pytest.mark.parametrize("size", [100, 70_000, 3 * MIB])
async def test_blocks_that_are_put_on_the_same_host_come_back_as_they_were(size: int) -> None:
    async with store() as (node, client):
        blocks = chain(7, size=size)
        guest = await asyncio.to_thread(open_door, node.record, True, "", 30.0)
        assert await asyncio.to_thread(guest.write, [(block, 0) for block in blocks], 60.0) == bytes([Status.OK] * 7)
        assert all(guest._stage.fits(block) for block in blocks)
        guest.close()
        fetched = await fetch(client, await stored(client, blocks))
        assert [b"".join(block.payload) for block in fetched.blocks] == [b"".join(block.payload) for block in blocks]


async def test_what_does_not_fit_goes_over_the_connection() -> None:
    async with store(paths="local", arena=128 * MIB) as (_, client):
        blocks = chain(2, size=staging.STAGE_BYTES // 2 + 1)
        assert len((await fetch(client, await stored(client, blocks))).blocks) == 2


async def test_the_copy_is_checked_and_not_what_a_writer_makes_of_the_original(monkeypatch) -> None:
    async with store() as (node, _):
        guest, memory = await asyncio.to_thread(guest_of, node)
        (block,) = chain(1, size=4000)
        right, write = np.frombuffer(b"".join(block.payload), np.uint8), Arena.write

        def late(arena, extents, offset, data):
            write(arena, extents, offset, data)
            memory[: len(right)] = right

        monkeypatch.setattr(Arena, "write", late)
        header = block.header.to_bytes()
        request = door.message(Kind.OFFER, door.OFFER.pack(0, 0, len(right), len(header)), header)
        for expected in (Status.DATA_LOSS, Status.OK):  # by the second time the right bytes are there
            await asyncio.to_thread(guest.send, [request])
            assert bytes(await asyncio.to_thread(guest.receive, Kind.STATUSES)) == bytes([expected])
            assert (node.engine.table.get(block.header.key) is not None) == (expected is Status.OK)
            assert node.engine.reserved_bytes == 0
        guest.close()


async def test_offers_that_are_none_end_the_connection() -> None:
    async with store() as (node, _):
        (block,) = chain(1, size=4000)
        header = block.header.to_bytes()
        for parts in (
            [door.OFFER.pack(0, staging.STAGE_BYTES - 1, 2, len(header)), header],
            [door.OFFER.pack(0, 2**64 - 1, 4000, len(header)), header],
            [door.OFFER.pack(0, 0, 2**64 - 1, len(header)), header],
            [door.OFFER.pack(0, 0, 4000, len(header) + 1), header],
            [b"short"],
        ):
            guest, _ = await asyncio.to_thread(guest_of, node)
            await asyncio.to_thread(guest.send, [door.message(Kind.OFFER, *parts)])
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
        _, descriptor = await asyncio.to_thread(guest.receive_memory, Kind.STAGED)
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
