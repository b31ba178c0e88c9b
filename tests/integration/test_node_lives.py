"""Real nodes that are killed, drained, restarted and cut off from a real Valkey: what is served after, and what the index says."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import grpc
import pytest
import redis

from kvstore.clock import ManualClock
from kvstore.errors import ConcertinaError
from kvstore.metadata import IndexEntry, Metadata, NodeRecord, connect
from kvstore.metadata.embedded import EmbeddedValkey, start_valkey
from kvstore.metadata.reconcile import GRACE_S, Reconciler
from kvstore.node.announce import SLICE_KEYS, SLICE_PAUSE_S, Announcer
from kvstore.node.spill.journal import Journal
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb
from protos.concertina.kvstore.v1 import kvstore_pb2_grpc as rpc
from tests.node_support import block, chain, frames
from tests.valkey_support import redis_cluster

CHAINS = [chain(4, (60_000, 90_000), first=number) for number in range(0, 40, 4)]  # three times an arena of 2 MiB
BLOCKS = [one for blocks in CHAINS for one in blocks]
KEYS = [one.header.key for one in BLOCKS]


@pytest.fixture
def valkey(tmp_path: Path):
    server = start_valkey(tmp_path / "valkey")
    yield server
    server.stop()


class Node:
    """A running ``concertina node``."""

    def __init__(self, process: asyncio.subprocess.Process, ready: dict[str, Any], channel: grpc.aio.Channel) -> None:
        self.process = process
        self.address, self.incarnation = ready["address"], ready["incarnation"]
        self.stub = rpc.KVStoreServiceStub(channel)

    async def put_all(self) -> None:
        for blocks in CHAINS:
            assert set((await self.stub.Put(frames(blocks), timeout=20)).statuses) == {pb.BLOCK_STATUS_OK}

    async def get(self, keys: list[bytes]) -> list[bytes]:
        answers = [b""] * len(keys)
        async for frame in self.stub.Get(pb.GetRequest(keys=keys), timeout=20):
            answers[frame.index] += frame.header + frame.payload
        return answers

    async def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), 30)


@asynccontextmanager
async def node(url: str, *options: str) -> AsyncIterator[Node]:
    arguments = ["-m", "services.cli", "node", "--redis", url, "--id", "n1", "--arena", "2MiB", "--policy", "lru", *options]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        line = await asyncio.wait_for(process.stdout.readline(), 60)
        assert line, (await process.stderr.read()).decode()
        ready = json.loads(line)
        async with grpc.aio.insecure_channel(ready["address"]) as channel:
            yield Node(process, ready, channel)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def held(metadata: Metadata, incarnation: str) -> int:
    """Blocks that the index says this incarnation holds."""
    return sum(any(place.incarnation == incarnation for place in places) for places in await metadata.locate(KEYS))


async def until(probe: Callable[[], Any], wanted: Any) -> None:
    async with asyncio.timeout(20):
        while await probe() != wanted:
            await asyncio.sleep(0.05)


@asynccontextmanager
async def index(url: str) -> AsyncIterator[Metadata]:
    metadata = connect(url, timeout_s=5)
    yield metadata
    await metadata.close()


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
async def test_a_node_comes_back_with_what_it_had_spilled(valkey: EmbeddedValkey, tmp_path: Path, ending: signal.Signals) -> None:
    """After SIGTERM with all its blocks, after SIGKILL with those that were written; never with a wrong byte."""
    options = ("--spill", str(tmp_path / "spill"), "--spill-bytes", "32MiB")
    async with index(valkey.url) as metadata:
        async with node(valkey.url, *options) as first:
            await first.put_all()
            assert await first.get(KEYS) == [one.to_bytes() for one in BLOCKS]
            await until(lambda: held(metadata, first.incarnation), len(BLOCKS))
            with pytest.raises(AssertionError, match="another living node"):
                async with node(valkey.url, *options):
                    pass
            assert (await first.end(ending) == 0) == (ending == signal.SIGTERM)
            assert await held(metadata, first.incarnation) == (0 if ending == signal.SIGTERM else len(BLOCKS))
        found = len(Journal(tmp_path / "spill" / "index", 1).places)
        assert found == len(BLOCKS) if ending == signal.SIGTERM else found > 0
        async with node(valkey.url, *options) as second:
            await until(lambda: held(metadata, second.incarnation), found)
            got = await second.get(KEYS)
            assert sum(map(bool, got)) == found
            assert all(blob in (b"", one.to_bytes()) for blob, one in zip(got, BLOCKS, strict=True))


async def test_a_drain_is_bounded_whoever_reads(valkey: EmbeddedValkey) -> None:
    """SIGTERM with a reader that does not read and a writer that does not end: both are cut off, the index is left in order."""
    async with index(valkey.url) as metadata, node(valkey.url) as one:
        await one.stub.Put(frames(CHAINS[0]), timeout=20)
        small_window = [("grpc.http2.lookahead_bytes", 65_535), ("grpc.http2.bdp_probe", 0)]
        async with grpc.aio.insecure_channel(one.address, options=small_window) as channel:
            stub = rpc.KVStoreServiceStub(channel)
            reading = stub.Get(pb.GetRequest(keys=KEYS[:4] * 500), timeout=60)
            await anext(aiter(reading))
            writing = stub.Put(timeout=60)
            await writing.write(next(frames(CHAINS[1])))
            one.process.send_signal(signal.SIGTERM)
            await until(metadata.nodes, [])
            with suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):  # the stream may have ended already
                await writing.write(pb.PutRequest(index=1, header=block(9).header.to_bytes()))
            # Once the server itself has begun to stop, gRPC may answer for it.
            cut_off = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL)
            assert await writing.code() in cut_off
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await one.stub.Put(frames([block(8)]), timeout=5)
            assert caught.value.code() in cut_off
            assert await asyncio.wait_for(one.process.wait(), 20) == 0
        assert await held(metadata, one.incarnation) == 0


async def test_a_killed_nodes_rows_are_removed_by_the_others(valkey: EmbeddedValkey) -> None:
    async with index(valkey.url) as metadata:
        async with node(valkey.url) as dead:
            await dead.put_all()
            await until(lambda: held(metadata, dead.incarnation), (await dead.stub.Stats(pb.StatsRequest())).blocks)
            await dead.end(signal.SIGKILL)
        await until(metadata.nodes, [])
        async with node(valkey.url, "--id", "n2") as living:
            await living.stub.Put(frames(CHAINS[0]), timeout=20)
            await until(lambda: held(metadata, living.incarnation), 4)
            clock = ManualClock()
            reconciler = Reconciler(metadata, living.incarnation, clock, step_blocks=1000)
            assert await reconciler.step()
            assert await held(metadata, dead.incarnation), "it may only be slow"
            clock.advance(GRACE_S + 1)
            assert await reconciler.step()
            assert await held(metadata, dead.incarnation) == 0
            assert await held(metadata, living.incarnation) == 4


@pytest.mark.parametrize("loss", ["FLUSHALL", "restart"])
async def test_a_loss_of_the_index_is_made_good(tmp_path: Path, loss: str) -> None:
    server = start_valkey(tmp_path / "valkey")
    try:
        async with index(server.url) as metadata, node(server.url) as one:
            await one.put_all()
            resident = (await one.stub.Stats(pb.StatsRequest())).blocks
            await until(lambda: held(metadata, one.incarnation), resident)
            if loss == "FLUSHALL":
                with redis.Redis(port=server.port) as direct:
                    direct.flushall()
            else:
                server.stop()
                server = start_valkey(tmp_path / "valkey", server.port)
            await until(lambda: _or_none(held(metadata, one.incarnation)), resident)
            assert [record.incarnation for record in await metadata.nodes()] == [one.incarnation]
    finally:
        server.stop()


async def _or_none(call: Any) -> Any:
    try:
        return await call
    except ConcertinaError:  # away for a moment
        return None


async def test_one_namespace_over_a_redis_cluster_and_the_loss_of_a_shard(tmp_path: Path) -> None:
    with redis_cluster(tmp_path) as servers:
        async with index(servers[1].url) as metadata, node(servers[0].url) as one:
            await one.put_all()
            resident = (await one.stub.Stats(pb.StatsRequest())).blocks
            await until(lambda: held(metadata, one.incarnation), resident)
            with redis.Redis(port=servers[2].port) as direct:
                assert direct.dbsize()
                direct.flushall()
            await until(lambda: held(metadata, one.incarnation), resident)
            assert await one.end(signal.SIGTERM) == 0
            assert await held(metadata, one.incarnation) == 0


class Counting:
    """The announcing half of a `Metadata`, with the time and size of every call."""

    def __init__(self, metadata: Metadata) -> None:
        self.calls: list[tuple[float, int]] = []
        self._metadata = metadata

    def __getattr__(self, name: str) -> Any:
        return getattr(self._metadata, name)

    async def announce(self, incarnation: str, entries: list) -> None:
        self.calls.append((monotonic(), len(entries)))
        await self._metadata.announce(incarnation, entries)


async def test_announcing_again_is_a_slice_at_a_time(valkey: EmbeddedValkey) -> None:
    """40,000 blocks: calls of at most a slice, a pause between any two."""
    keys = [os.urandom(32) for _ in range(40_000)]
    record = NodeRecord("n1", "a1" * 8, "n1:1")
    async with index(valkey.url) as metadata:
        counting = Counting(metadata)
        announcer = Announcer(counting, lambda: record, lambda key: IndexEntry(key, 5, 1), lambda: keys, 0.05)
        await announcer.start()

        async def known() -> int:
            return sum(map(bool, await metadata.locate(keys)))

        await until(known, len(keys))
        counting.calls.clear()
        with redis.Redis(port=valkey.port) as direct:
            direct.flushall()
        await until(known, len(keys))
        sizes = [size for _, size in counting.calls]
        assert max(sizes) <= SLICE_KEYS
        gaps = [later - earlier for (earlier, _), (later, _) in zip(counting.calls, counting.calls[1:], strict=False)]
        assert min(gaps) >= SLICE_PAUSE_S
        await announcer.stop(5)
        assert await known() == 0
