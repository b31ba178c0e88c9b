"""A node with tiers behind its arena, as its callers and its index see it: nothing is lost to pressure, nor to a restart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from kvstore.block import EncodedBlock
from kvstore.clock import ManualClock
from kvstore.metadata import InprocMetadata, InprocState
from kvstore.node import NodeConfig, StoreNode
from kvstore.node.spill.disk import SUFFIX
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb
from protos.concertina.kvstore.v1 import kvstore_pb2_grpc as rpc
from tests.node_support import block, chain, frames

OK, NOT_FOUND = pb.BLOCK_STATUS_OK, pb.BLOCK_STATUS_NOT_FOUND
CHAINS = [chain(4, (60_000, 90_000), first=number) for number in range(0, 24, 4)]  # three times the arena
BLOCKS = [one for blocks in CHAINS for one in blocks]
KEYS = [one.header.key for one in BLOCKS]


def config(tmp_path: Path, tiers: str) -> NodeConfig:
    one = NodeConfig(arena=1 << 20, id="n1", heartbeat_s=0.02, drain_s=4.0, policy="lru", metrics="127.0.0.1:0")
    if "memory" in tiers:
        one = replace(one, spill_host_bytes=8 << 20)
    return replace(one, spill=str(tmp_path / "spill"), spill_bytes=8 << 20) if "disk" in tiers else one


@asynccontextmanager
async def running(settings: NodeConfig, state: InprocState) -> AsyncIterator[tuple[StoreNode, rpc.KVStoreServiceStub]]:
    clock = ManualClock(len(state.nodes))
    node = StoreNode(settings, InprocMetadata(clock, state), clock)
    await node.start()
    try:
        async with grpc.aio.insecure_channel(node.address) as channel:
            yield node, rpc.KVStoreServiceStub(channel)
        node.engine.check()
        node.spill.check()
    finally:
        await node.stop()


async def put_all(stub: rpc.KVStoreServiceStub) -> None:
    for blocks in CHAINS:
        assert list((await stub.Put(frames(blocks), timeout=10)).statuses) == [OK] * len(blocks)


async def get(stub: rpc.KVStoreServiceStub, keys: list[bytes], **options: int) -> list[bytes]:
    """All bytes of each block, empty for one that is not found."""
    answers = [b""] * len(keys)
    async for frame in stub.Get(pb.GetRequest(keys=keys, **options), timeout=10):
        answers[frame.index] += frame.header + frame.payload
    return answers


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def disk_bytes(tmp_path: Path) -> int:
    return sum(path.stat().st_size for path in tmp_path.rglob(f"*{SUFFIX}"))


def spoil(tmp_path: Path, one: EncodedBlock) -> None:
    """A bit of a block's payload changes on the disk."""
    for path in tmp_path.rglob(f"*{SUFFIX}"):
        data = bytearray(path.read_bytes())
        if (at := data.find(one.to_bytes()[:4000])) >= 0:
            data[at + 2000] ^= 0x10
            path.write_bytes(data)
            return
    raise AssertionError("the block is not on the disk")


@pytest.mark.parametrize("tiers", ["memory", "disk", "memory and disk"])
async def test_what_the_arena_loses_is_still_served_and_in_the_index(tmp_path: Path, tiers: str) -> None:
    state = InprocState()
    async with running(config(tmp_path, tiers), state) as (node, stub):
        await put_all(stub)
        assert 0 < len(node.engine.table) < len(BLOCKS)
        await until(lambda: len(state.holders) == len(BLOCKS))
        assert await get(stub, KEYS) == [one.to_bytes() for one in BLOCKS]
        assert (await get(stub, KEYS, max_fidelity=1))[-1] == BLOCKS[-1].truncate(1).to_bytes()
        assert await get(stub, [block(99).header.key]) == [b""]
        for level in node.spill.levels:
            await level.flush()
        stats = await stub.Stats(pb.StatsRequest())
        assert (stats.spill_used_bytes, stats.spilled_blocks) == (sum(x.used_bytes for x in node.spill.levels), len(node.spill))
        assert stats.spill_bytes == len(node.spill.levels) * (8 << 20)
        if "disk" in tiers:
            assert disk_bytes(tmp_path) <= 8 << 20
            assert node.spill.levels[-1].used_bytes == node.spill.levels[-1].tier.used_bytes
    assert not state.holders


async def test_a_block_that_was_read_from_a_tier_is_in_the_arena_again(tmp_path: Path) -> None:
    async with running(config(tmp_path, "disk"), InprocState()) as (node, stub):
        await put_all(stub)
        missing = next(key for key in KEYS if node.engine.table.get(key) is None)
        await get(stub, [missing])
        assert node.engine.table.get(missing) is not None
        await node.spill.levels[0].flush()
        written = node.spill.levels[0].tally.stored
        for key in KEYS:  # what goes back and forth is not written again
            await get(stub, [key])
        await node.spill.levels[0].flush()
        assert node.spill.levels[0].tally.stored - written <= len(BLOCKS)
        first = node.spill.levels[0].tally.stored
        for key in KEYS:
            await get(stub, [key])
        await node.spill.levels[0].flush()
        assert node.spill.levels[0].tally.stored == first


async def test_a_spilled_block_can_be_pinned_evicted_and_cleared(tmp_path: Path) -> None:
    state = InprocState()
    async with running(config(tmp_path, "disk"), state) as (node, stub):
        await put_all(stub)
        gone = [key for key in KEYS if node.engine.table.get(key) is None]
        assert list((await stub.Pin(pb.PinRequest(keys=gone[:1], ttl_seconds=60))).statuses) == [OK]
        assert list((await stub.Evict(pb.EvictRequest(keys=[gone[0], gone[1], gone[1]]))).statuses)[1:] == [OK, NOT_FOUND]
        await stub.Unpin(pb.UnpinRequest(keys=gone[:1]))
        await until(lambda: len(state.holders) == len(BLOCKS) - 1)
        assert await get(stub, [gone[1]]) == [b""]
        assert (await stub.Clear(pb.ClearRequest())).blocks == len(BLOCKS) - 1
        await until(lambda: not state.holders)
        assert not any(await get(stub, KEYS))
        await node.spill.levels[0].flush()
        assert node.spill.levels[0].tier.used_bytes == 0


async def test_a_restarted_node_announces_and_serves_what_is_on_its_disk(tmp_path: Path) -> None:
    """Arena and all: a drain spills what is resident. One damaged file is one counted miss."""
    state = InprocState()
    async with running(config(tmp_path, "disk"), state) as (_, stub):
        await put_all(stub)
    assert not state.holders
    spoil(tmp_path, BLOCKS[3])
    async with running(config(tmp_path, "disk"), state) as (node, stub):
        await until(lambda: len(state.holders) == len(BLOCKS))
        assert await get(stub, KEYS) == [b"" if number == 3 else one.to_bytes() for number, one in enumerate(BLOCKS)]
        await until(lambda: KEYS[3] not in state.holders)
        assert node.spill.levels[0].tally.corrupt == 1
        page = await scrape(node)
        assert 'concertina_corrupt_blocks_total{where="spill"} 1.0' in page
        used = node.spill.levels[0].used_bytes
        assert f'concertina_spill_bytes{{node="n1",state="used",tier="disk"}} {float(used)}' in page or f"{used:.6e}" in page


async def scrape(node: StoreNode) -> str:
    host, _, port = node.record.metrics.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
    page = (await reader.read()).decode()
    writer.close()
    return page
