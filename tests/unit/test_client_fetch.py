"""What a fetch accepts, over a transport that can be told to misbehave."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from kvstore.block import BlockHeader, Distortion, Provenance
from kvstore.errors import CapacityError, InvalidInputError, TransportError
from kvstore.identity import digest
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb
from tests.client_support import NAMESPACE, NODES, Bench, chain


def spoilt(blob: bytes, index: int = 0) -> list[pb.GetResponse]:
    size = BlockHeader.from_bytes(blob).header_bytes
    return [pb.GetResponse(index=index, status=pb.BLOCK_STATUS_OK, header=blob[:size], payload=blob[size:])]


@pytest.mark.parametrize("frame_bytes", [100, 700, 1 << 20])
async def test_blocks_come_back_bit_for_bit_and_in_order(frame_bytes):
    blocks = chain(9)
    async with Bench(frame_bytes=frame_bytes, offload_bytes=1200) as bench:
        keys = await bench.store(blocks)
        seen = []
        fetched = await bench.fetch(keys, on_block=lambda i, b: seen.append((i, b.header.key)))
        assert [b.to_bytes() for b in fetched.blocks] == [b.to_bytes() for b in blocks]
        assert seen == list(enumerate(keys))
        assert fetched.bytes_fetched >= sum(b.header.total_bytes for b in blocks)
        assert bench.count("fetch_bytes") == fetched.bytes_fetched


async def test_a_fetch_may_begin_in_the_middle_of_a_chain():
    blocks = chain(6)
    async with Bench() as bench:
        keys = await bench.store(blocks)
        assert len((await bench.fetch(keys[2:], parent_of_first=keys[1])).blocks) == 4
        assert (await bench.fetch(keys[2:])).blocks == []


async def test_a_missing_block_cuts_the_prefix():
    blocks = chain(8)
    async with Bench() as bench:
        keys = await bench.store(blocks)
        for node in NODES:
            bench.transport.stored[node.address].pop(keys[5], None)
        assert [b.header.key for b in (await bench.fetch(keys)).blocks] == keys[:5]
        assert bench.count("corrupt_blocks", "fetch") == 0


def flip(blob: bytes, at: int) -> bytes:
    return blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :]


@pytest.mark.parametrize("at", [0, 9, 60, 200, -1])
async def test_any_flipped_bit_is_a_counted_miss(at):
    blocks = chain(4)
    async with Bench(streams_per_node=1) as bench:
        keys = await bench.store(blocks)
        blob = blocks[2].to_bytes()
        bench.transport.stored[NODES[0].address][keys[2]] = blob
        size = blocks[2].header.header_bytes
        bad = flip(blob, at % len(blob))
        bench.transport.spoil[keys[2]] = [pb.GetResponse(index=1, status=1, header=bad[:size], payload=bad[size:])]
        assert [b.header.key for b in (await bench.fetch(keys)).blocks] == keys[:2]
        assert bench.count("corrupt_blocks", "fetch") == 1


async def test_another_block_than_the_one_asked_for_is_a_counted_miss():
    blocks = chain(4)
    async with Bench(streams_per_node=1) as bench:
        keys = await bench.store(blocks)
        bench.transport.spoil[keys[2]] = spoilt(blocks[3].to_bytes(), index=1)
        assert len((await bench.fetch(keys)).blocks) == 2
        assert bench.count("corrupt_blocks", "fetch") == 1


async def test_a_block_of_another_chain_is_a_counted_miss():
    blocks = chain(4)
    async with Bench(streams_per_node=1) as bench:
        keys = await bench.store(blocks)
        stranger = blocks[2].with_identity(keys[2], NAMESPACE, keys[0])
        bench.transport.spoil[keys[2]] = spoilt(stranger.to_bytes(), index=1)
        assert len((await bench.fetch(keys)).blocks) == 2
        assert bench.count("corrupt_blocks", "fetch") == 1


async def test_another_namespace_never_hits():
    async with Bench() as bench:
        keys = await bench.store(chain(3))
        assert (await bench.fetch(keys, namespace=digest(b"tenant b"))).blocks == []


@pytest.mark.parametrize(
    "messages",
    [
        [pb.GetResponse(index=1, status=1, payload=b"no header")],
        [pb.GetResponse(index=7, status=1)],
        [pb.GetResponse(status=1, header=chain(1)[0].header.to_bytes(), payload=bytes(5000))],
        [pb.GetResponse(status=1, header=chain(1)[0].header.to_bytes()), pb.GetResponse(status=1)],
        [pb.GetResponse(status=1, header=chain(1)[0].header.to_bytes()), pb.GetResponse(status=4)],
        [pb.GetResponse(status=1, header=chain(1)[0].header.to_bytes(), payload=bytes(10))],
    ],
    ids=["no header", "wrong index", "too much", "empty frame", "given up", "ends early"],
)
async def test_a_node_that_breaks_the_protocol_is_a_miss(messages):
    blocks = chain(1)
    async with Bench() as bench:
        keys = await bench.store(blocks)
        bench.transport.spoil[keys[0]] = messages
        assert (await bench.fetch(keys)).blocks == []


async def test_a_huge_block_is_refused_before_it_is_allocated():
    blocks = chain(2)
    async with Bench(max_block_bytes=1000) as bench:
        keys = await bench.store(blocks)
        assert (await bench.fetch(keys)).blocks == []
        assert bench.count("corrupt_blocks", "fetch") >= 1


@pytest.mark.parametrize(
    ("asked", "own", "provenance", "served"),
    [
        (0.0, 0.5, None, 3),
        (0.1, 0.1, None, 3),
        (0.1, 0.2, None, 0),
        (0.1, 0.0, Distortion(0.2, 0.0), 0),
        (0.1, 0.0, Distortion(0.0, 0.05), 3),
        (0.1, float("nan"), None, 0),
    ],
)
async def test_what_is_less_exact_than_asked_is_a_miss(asked, own, provenance, served):
    blocks = chain(3, distortion=own, provenance=provenance and Provenance(1, provenance))
    async with Bench() as bench:
        keys = await bench.store(blocks)
        # float32 in the header: 0.1 is stored a little above 0.1
        fetched = await bench.fetch(keys, max_distortion=asked and np.nextafter(np.float32(asked), np.float32(1)).item())
        assert len(fetched.blocks) == served
        assert bench.count("corrupt_blocks", "fetch") == 0


async def test_at_the_deadline_the_whole_prefix_that_arrived_is_returned():
    blocks = chain(8)
    async with Bench(streams_per_node=4) as bench:
        keys = await bench.store(blocks)
        bench.transport.stuck_at = {keys[4]}
        fetched = await asyncio.wait_for(bench.fetch(keys, deadline_s=0.3), 5)
        assert [b.header.key for b in fetched.blocks] == keys[:4]


async def test_a_failing_node_is_a_miss_and_left_alone_for_a_moment():
    blocks = chain(6)
    async with Bench(suspect_s=0.2) as bench:
        keys = await bench.store(blocks)
        bench.transport.fail[NODES[1].address] = TransportError("gone")
        assert [b.header.key for b in (await bench.fetch(keys)).blocks] == keys[:1]
        assert bench.count("store_unavailable", "node") >= 1
        assert len(await bench.client.lookup(keys)) == 1
        bench.transport.fail.clear()
        await asyncio.sleep(0.25)
        assert len((await bench.fetch(keys)).blocks) == 6


async def test_nothing_more_is_read_once_the_prefix_is_cut():
    blocks = chain(40)
    async with Bench(streams_per_node=1) as bench:
        keys = await bench.store(blocks)
        bench.transport.spoil[keys[0]] = [pb.GetResponse(status=pb.BLOCK_STATUS_NOT_FOUND)]
        assert (await bench.fetch(keys)).blocks == []
        assert len(bench.transport.sent) < 10


async def test_what_a_callback_raises_reaches_the_caller():
    def fails(position, block):
        raise CapacityError(f"no page for block {position}")

    async with Bench() as bench:
        keys = await bench.store(chain(3))
        with pytest.raises(CapacityError, match="block 0"):
            await bench.fetch(keys, on_block=fails)
        assert len((await bench.fetch(keys)).blocks) == 3


async def test_a_malformed_key_is_the_callers_mistake():
    async with Bench() as bench:
        with pytest.raises(InvalidInputError, match="32 bytes"):
            await bench.client.lookup([b"short"])
        assert bench.client.available
        assert await bench.client.lookup([]) == []
        assert (await bench.client.fetch([], namespace=NAMESPACE)).blocks == []


async def test_a_fault_of_ours_in_one_stream_is_a_miss_and_said_aloud(caplog):
    async with Bench() as bench:
        keys = await bench.store(chain(4))
        bench.transport.fail[NODES[1].address] = ZeroDivisionError("a bug")
        assert [b.header.key for b in (await asyncio.wait_for(bench.fetch(keys, deadline_s=60), 5)).blocks] == keys[:1]
        assert "a bug" in caplog.text
