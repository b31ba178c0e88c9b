"""A node and the cluster's metadata: announcements, loss of the index, absence, drain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import grpc
import pytest
import pytest_asyncio

from kvstore.clock import ManualClock
from kvstore.metadata import InprocMetadata, InprocState
from kvstore.node import NodeConfig, StoreNode
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb
from protos.concertina.kvstore.v1 import kvstore_pb2_grpc as rpc
from tests.node_support import block, chain, frames

CONFIG = NodeConfig(arena=1 << 20, id="n1", heartbeat_s=0.02, drain_s=2.0, policy="lru")


@pytest.fixture
def state() -> InprocState:
    return InprocState()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest_asyncio.fixture
async def node(state: InprocState, clock: ManualClock) -> AsyncIterator[StoreNode]:
    one = StoreNode(CONFIG, InprocMetadata(clock, state), clock)
    await one.start()
    yield one
    await one.stop()


@pytest_asyncio.fixture
async def stub(node: StoreNode) -> AsyncIterator[rpc.KVStoreServiceStub]:
    async with grpc.aio.insecure_channel(node.address) as channel:
        yield rpc.KVStoreServiceStub(channel)


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition that another task brings about; TimeoutError if it never comes."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def indexed(state: InprocState, node: StoreNode) -> dict[bytes, tuple[int, int]]:
    """Size and fidelity of each key that the index says `node` holds."""
    places = {key: holders.get(node.record.incarnation) for key, holders in state.holders.items()}
    return {key: (place.size_bytes, place.fidelity) for key, place in places.items() if place}


def resident(node: StoreNode) -> dict[bytes, tuple[int, int]]:
    return {e.key: (e.header.total_bytes, e.header.present) for e in node.engine.table}


async def test_the_index_follows_puts_evictions_and_demotions(stub, node: StoreNode, state: InprocState) -> None:
    for first in range(0, 24, 6):
        await stub.Put(frames(chain(6, (60_000, 50_000), first)))
    await stub.Evict(pb.EvictRequest(keys=[block(23).header.key]))
    assert node.engine.tally.evictions.total() + node.engine.tally.demotions.total() > 1
    await until(lambda: indexed(state, node) == resident(node))


async def test_the_record_tells_what_the_node_is(stub, node: StoreNode, state: InprocState, clock: ManualClock) -> None:
    await stub.Put(frames(chain(2)))
    await until(lambda: state.nodes[node.record.incarnation][1].blocks == 2)
    (record,) = await InprocMetadata(clock, state).nodes()
    assert (record.id, record.address, record.arena_bytes, record.device) == ("n1", node.address, 1 << 20, "cpu")
    assert record.used_bytes == node.engine.used_bytes > 0
    assert len(record.incarnation) == 16


async def test_after_a_loss_of_the_index_everything_is_announced_again(stub, node: StoreNode, state: InprocState) -> None:
    await stub.Put(frames(chain(8)))
    await until(lambda: len(indexed(state, node)) == 8)
    state.lose()
    await until(lambda: indexed(state, node) == resident(node))
    assert len(resident(node)) == 8


@pytest.mark.parametrize("how", ["away", "slow"])
async def test_while_the_metadata_is_gone_the_node_serves_and_catches_up_later(stub, node: StoreNode, state: InprocState, how: str) -> None:
    await stub.Put(frames(chain(4)))
    await until(lambda: len(indexed(state, node)) == 4)
    setattr(state, how, True)
    await stub.Put(frames(chain(4, first=10)))
    await stub.Evict(pb.EvictRequest(keys=[block(3).header.key]))
    seen = await stub.Lookup(pb.LookupRequest(keys=[block(10).header.key]))
    assert seen.blocks[0].status == pb.BLOCK_STATUS_OK
    await asyncio.sleep(0.1)
    assert indexed(state, node) != resident(node)
    setattr(state, how, False)
    await until(lambda: indexed(state, node) == resident(node))


async def test_a_node_starts_without_its_metadata(state: InprocState, clock: ManualClock) -> None:
    state.away = True
    node = StoreNode(CONFIG, InprocMetadata(clock, state), clock)
    await node.start()
    state.away = False
    await until(lambda: state.nodes)
    await node.stop()
    assert not state.nodes


async def test_too_many_waiting_changes_end_in_a_full_announcement(
    stub, node: StoreNode, state: InprocState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.node.announce.MAX_PENDING", 5)
    monkeypatch.setattr("kvstore.node.announce.SLICE_KEYS", 3)
    state.away = True
    await stub.Put(frames(chain(20, (100, 100))))
    assert len(node._announcer._pending) <= 5
    state.away = False
    await until(lambda: indexed(state, node) == resident(node))
    assert len(resident(node)) == 20


async def test_stopping_leaves_nothing_behind_and_lets_reads_finish(state: InprocState, clock: ManualClock) -> None:
    node = StoreNode(CONFIG, InprocMetadata(clock, state), clock)
    await node.start()
    channel = grpc.aio.insecure_channel(node.address)
    stub = rpc.KVStoreServiceStub(channel)
    blocks = [block(i, (200_000,)) for i in range(4)]
    await stub.Put(frames(blocks))
    await until(lambda: len(indexed(state, node)) == 4)
    reading = aiter(stub.Get(pb.GetRequest(keys=[b.header.key for b in blocks])))
    first = await anext(reading)
    ending = asyncio.create_task(node.stop())
    await until(lambda: not state.nodes)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Put(frames([block(9)]), timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    rest = [frame async for frame in reading]
    assert [f.status for f in (first, *rest)] == [pb.BLOCK_STATUS_OK] * 4
    assert b"".join(f.payload for f in (first, *rest)) == b"".join(p for b in blocks for p in b.payload)
    await ending
    assert not state.holders
    await channel.close()


async def test_a_restarted_node_is_another_incarnation(state: InprocState, clock: ManualClock) -> None:
    seen = set()
    for _ in range(2):
        node = StoreNode(CONFIG, InprocMetadata(clock, state), clock)
        await node.start()
        seen.add(node.record.incarnation)
        await node.stop()
    assert len(seen) == 2


async def test_a_reader_slower_than_its_lease_loses_the_block_and_never_reads_another(stub, node: StoreNode, clock: ManualClock) -> None:
    """The reader stalls, its lease ends, its pages are written by others: the stream must say so."""
    big = block(0, (900_000,))
    await stub.Put(frames([big]))
    small_window = [("grpc.http2.lookahead_bytes", 65_535), ("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(node.address, options=small_window) as channel:
        slow = aiter(rpc.KVStoreServiceStub(channel).Get(pb.GetRequest(keys=[big.header.key] * 8), timeout=20))
        first = await anext(slow)
        clock.advance(60.0)
        assert list((await stub.Put(frames([block(i, (200_000,), salt=1) for i in range(1, 5)]))).statuses) == [pb.BLOCK_STATUS_OK] * 4
        got = {0: [first]}
        async for frame in slow:
            got.setdefault(frame.index, []).append(frame)
    payload = big.payload[0]
    whole = 0
    for frames_ in got.values():
        data = b"".join(f.payload for f in frames_)
        if frames_[-1].status == pb.BLOCK_STATUS_OK:
            assert data == payload
            whole += 1
        else:
            assert frames_[-1].status in (pb.BLOCK_STATUS_NOT_FOUND, pb.BLOCK_STATUS_DATA_LOSS)
            assert payload.startswith(data)
    assert 0 < whole < 8, "some went out before, some were lost"


async def test_a_node_whose_account_does_not_add_up_takes_no_more_blocks(state: InprocState, clock: ManualClock) -> None:
    node = StoreNode(CONFIG, InprocMetadata(clock, state), clock)
    await node.start()
    node.engine.allocator.alloc(1)
    await asyncio.wait_for(node.failed.wait(), 10)
    async with grpc.aio.insecure_channel(node.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc.KVStoreServiceStub(channel).Put(frames(chain(1)))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await node.stop()
