"""Layer-wise delivery: the last blocks of a fetch are given with the model's lowest layers, and the others follow, by every way."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from kvstore.block import SECTIONS, BlockHeader, EncodedBlock
from kvstore.client import Sections
from kvstore.client.door import Door
from kvstore.client.transport import GrpcTransport
from kvstore.errors import InvalidInputError, TransportError
from kvstore.node.door import Guest
from kvstore.node.handlers.get import Get
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb
from tests.client_support import chain
from tests.integration.test_door import came_by, fetch, same, store, stored

MIB = 1 << 20
LAYERS = 10
WAYS = [("", "grpc"), ("tcp", "tcp")]


def sectioned(count: int, size: int) -> list[EncodedBlock]:
    """A chain of blocks of ten model layers, each of `size` bytes, whose sections certify themselves."""
    rng, blocks = np.random.default_rng(3), []
    for block in chain(count):
        header = replace(block.header, layers=LAYERS, rows=block.header.rows[:1], present=1)
        blocks.append(EncodedBlock.build(header, (rng.bytes(LAYERS * size),), sectioned=True))
    return blocks


class Slow:
    """Holds back every section but the first until `go`."""

    def __init__(self, monkeypatch) -> None:
        self.go = asyncio.Event()
        send, stream = Get._send_resident, Guest._stream

        async def send_resident(handler, index, found, section, outgoing):
            if section > 1:
                await outgoing.flush()
                await self.go.wait()
            await send(handler, index, found, section, outgoing)

        async def stream_slowly(guest, found, section):
            if section:
                await guest._flush()
                await self.go.wait()
            await stream(guest, found, section)

        monkeypatch.setattr(Get, "_send_resident", send_resident)
        monkeypatch.setattr(Guest, "_stream", stream_slowly)


async def waits(sections: Sections, layers: int) -> None:
    await asyncio.to_thread(sections.wait, layers)


@pytest.mark.parametrize(("paths", "way"), WAYS)
@pytest.mark.parametrize("size", [900, 400_000], ids=["small", "large"])
async def test_the_lowest_layers_are_given_while_the_others_are_under_way(monkeypatch, paths, way, size):
    blocks, slow = sectioned(6, size), Slow(monkeypatch)
    async with store(paths) as (_, client):
        hits = await stored(client, blocks)
        sections, given, some = Sections(4), [], asyncio.Event()

        def on_block(at, block):
            given.append(block)
            if at == 5:
                some.set()

        task = asyncio.create_task(fetch(client, hits, on_block=on_block, sections=sections))
        await asyncio.wait_for(some.wait(), 10)
        assert not task.done() and sections.unfinished() == [2, 3, 4, 5]
        await asyncio.wait_for(waits(sections, 2), 10)
        end = blocks[0].header.section(0)[1]
        for got, want in zip(given, blocks, strict=True):
            assert bytes(got.payload[0][:end]) == want.payload[0][:end]
        assert [bytes(b.payload[0]) == w.payload[0] for b, w in zip(given, blocks, strict=True)] == [True] * 2 + [False] * 4
        higher = asyncio.create_task(waits(sections, 3))
        await asyncio.sleep(0.05)
        assert not higher.done()
        slow.go.set()
        await asyncio.wait_for(higher, 10)
        fetched = await task
        await waits(sections, LAYERS)
        assert same(fetched, blocks) and fetched.blocks == given and came_by(client) == {way: 6}
        assert fetched.bytes_fetched >= sum(b.header.total_bytes for b in blocks)


async def test_out_of_shared_memory_blocks_come_whole():
    blocks = sectioned(6, 900)
    async with store("local") as (_, client):
        sections = Sections(4)
        assert same(await fetch(client, await stored(client, blocks), sections=sections), blocks)
        assert came_by(client) == {"local": 6} and not sections.unfinished()
        sections.wait(LAYERS)


@pytest.mark.parametrize(("paths", "way"), WAYS)
async def test_blocks_without_sections_come_whole_among_the_others(paths, way):
    blocks = sectioned(6, 900)
    blocks[3] = replace(blocks[3], header=replace(blocks[3].header, sections=()))
    async with store(paths) as (_, client):
        fetched = await fetch(client, await stored(client, blocks), sections=Sections(5))
        assert same(fetched, blocks) and came_by(client) == {way: 6}


@pytest.mark.parametrize("paths", ["", "tcp"])
@pytest.mark.parametrize("section", range(SECTIONS))
async def test_a_damaged_section_is_never_handed_on(paths, section):
    blocks = sectioned(6, 900)
    async with store(paths) as (node, client):
        hits = await stored(client, blocks)
        at = blocks[4].header.section(section)[0] + 7
        node.arena.write(node.engine.table.get(blocks[4].header.key).layers[0], at, bytes([blocks[4].payload[0][at] ^ 4]))
        sections = Sections(6)
        fetched = await fetch(client, hits, sections=sections)
        assert fetched.blocks == blocks[: len(fetched.blocks)] and len(fetched.blocks) <= 4
        assert client.metrics.corrupt_blocks.labels("fetch")._value.get() == 1
        if section:  # the block had been given
            with pytest.raises(TransportError):
                sections.wait(LAYERS)
        else:
            assert same(fetched, blocks[:4])
            sections.wait(LAYERS)


@pytest.mark.parametrize("paths", ["", "tcp"])
async def test_a_block_that_goes_before_its_upper_layers_is_lost(monkeypatch, paths):
    blocks, slow = sectioned(4, 900), Slow(monkeypatch)
    async with store(paths) as (node, client):
        hits = await stored(client, blocks)
        sections, given = Sections(4), asyncio.Event()
        task = asyncio.create_task(fetch(client, hits, sections=sections, on_block=lambda at, _: at == 3 and given.set()))
        await asyncio.wait_for(given.wait(), 10)
        monkeypatch.setattr(node.engine, "intact", lambda found: found.header.key != blocks[2].header.key)  # its lease has run out
        slow.go.set()
        assert len((await task).blocks) <= 2
        with pytest.raises(TransportError):
            sections.wait(LAYERS)


async def test_another_block_in_its_place_is_not_mixed_with_it(monkeypatch):
    """Between two sections a better block takes the place of one: its sections are another's."""
    blocks, slow = sectioned(2, 900), Slow(monkeypatch)
    async with store("tcp") as (_, client):
        hits = await stored(client, blocks)
        sections, given = Sections(2), asyncio.Event()
        task = asyncio.create_task(fetch(client, hits, sections=sections, on_block=lambda at, _: at == 1 and given.set()))
        await asyncio.wait_for(given.wait(), 10)
        to_bytes = BlockHeader.to_bytes
        monkeypatch.setattr(BlockHeader, "to_bytes", lambda header: to_bytes(replace(header, start=header.start + 1)))
        slow.go.set()
        assert not (await task).blocks
        with pytest.raises(TransportError):
            sections.wait(LAYERS)


async def test_what_has_not_come_at_the_deadline_is_lost(monkeypatch):
    blocks, _ = sectioned(3, 900), Slow(monkeypatch)
    async with store("tcp") as (_, client):
        hits, sections = await stored(client, blocks), Sections(2)
        fetched = await asyncio.wait_for(fetch(client, hits, sections=sections, deadline_s=0.3), 5)
        assert same(fetched, blocks[:1])
        with pytest.raises(TransportError):
            sections.wait(LAYERS)
        sections.wait(2)


async def test_a_fetch_that_is_cancelled_wakes_who_waits(monkeypatch):
    blocks, _ = sectioned(3, 900), Slow(monkeypatch)
    async with store("tcp") as (_, client):
        hits, sections, given = await stored(client, blocks), Sections(3), asyncio.Event()
        task = asyncio.create_task(fetch(client, hits, sections=sections, on_block=lambda at, _: at == 2 and given.set()))
        await asyncio.wait_for(given.wait(), 10)
        waiting = asyncio.create_task(waits(sections, LAYERS))
        task.cancel()
        with pytest.raises(TransportError):
            await asyncio.wait_for(waiting, 10)


@pytest.mark.parametrize("paths", ["", "tcp"])
async def test_sections_of_one_fetch_are_one_use(paths):
    blocks = sectioned(3, 900)
    async with store(paths) as (node, client):
        hits, uses = await stored(client, blocks), []
        used, before = node.engine.used, node.engine.requests.count
        node.engine.used = lambda plan, request: (uses.append(len(plan)), used(plan, request))
        await fetch(client, hits, sections=Sections(3))
        assert uses == [3] and node.engine.requests.count == before + 1


async def test_a_door_that_breaks_between_sections_is_followed_by_grpc(monkeypatch):
    blocks, read = sectioned(4, 900), Door._read_block

    def breaks(door, number, section, *others):
        if section == 2 and number == 1:
            raise OSError("the cable is out")
        return read(door, number, section, *others)

    monkeypatch.setattr(Door, "_read_block", breaks)
    calls, get = [], GrpcTransport.get

    def counted(transport, address, request, timeout_s):
        calls.append((request.section, len(request.keys)))
        return get(transport, address, request, timeout_s)

    monkeypatch.setattr(GrpcTransport, "get", counted)
    async with store("tcp") as (_, client):
        fetched = await fetch(client, await stored(client, blocks), sections=Sections(4))
        assert same(fetched, blocks)
        assert calls == [(3, 3), (4, 4)]


async def test_a_section_beyond_the_last_is_refused():
    async with store("") as (node, client):
        blocks = sectioned(1, 900)
        hits = await stored(client, blocks)
        with pytest.raises(InvalidInputError, match="section 5"):
            async for _ in client._transport.get(node.record.address, pb.GetRequest(keys=[hits[0].key], section=SECTIONS + 1), 5.0):
                pass
