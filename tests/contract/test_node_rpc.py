"""A node spoken to by the generated stub, as a stranger would: real blocks, and every kind of bad input."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvstore.arena.device import CpuArena
from kvstore.block import EncodedBlock, Provenance
from kvstore.errors import ConfigError
from kvstore.identity import digest
from kvstore.metadata import InprocMetadata
from kvstore.node import NodeConfig, StoreNode
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb
from protos.concertina.kvstore.v1 import kvstore_pb2_grpc as rpc
from tests.node_support import NAMESPACE, block, chain, frames

OK, NOT_FOUND, NO_ROOM = pb.BLOCK_STATUS_OK, pb.BLOCK_STATUS_NOT_FOUND, pb.BLOCK_STATUS_RESOURCE_EXHAUSTED
DATA_LOSS, EXISTS, BUSY = pb.BLOCK_STATUS_DATA_LOSS, pb.BLOCK_STATUS_ALREADY_EXISTS, pb.BLOCK_STATUS_BUSY


@pytest_asyncio.fixture
async def node() -> AsyncIterator[StoreNode]:
    one = StoreNode(NodeConfig(arena=4 << 20, metrics="127.0.0.1:0", id="n1", policy="lru"), InprocMetadata())
    await one.start()
    yield one
    one.engine.check()
    await one.stop()


@pytest_asyncio.fixture
async def channel(node: StoreNode) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(node.address) as one:
        yield one


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> rpc.KVStoreServiceStub:
    return rpc.KVStoreServiceStub(channel)


async def put(stub: rpc.KVStoreServiceStub, blocks: Sequence[EncodedBlock], step: int = 1 << 20) -> list[int]:
    return list((await stub.Put(frames(blocks, step), timeout=10)).statuses)


async def get(stub: rpc.KVStoreServiceStub, keys: Sequence[bytes], **options: int) -> dict[int, tuple[int, bytes]]:
    """Status of the last frame, and all bytes, by index."""
    answers: dict[int, tuple[int, bytes]] = {}
    async for frame in stub.Get(pb.GetRequest(keys=keys, **options), timeout=10):
        answers[frame.index] = (frame.status, answers.get(frame.index, (0, b""))[1] + frame.header + frame.payload)
    return answers


async def refusal(call) -> tuple[grpc.StatusCode, str, str]:
    """Code, reason and message of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    details = dict(caught.value.trailing_metadata())["grpc-status-details-bin"]
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(details).details[0].Unpack(info)
    assert info.domain == "concertina"
    return caught.value.code(), info.reason, caught.value.details()


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition that another task brings about; TimeoutError if it never comes."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("step", [700, 1 << 20])
async def test_blocks_come_back_byte_for_byte(stub, node: StoreNode, step: int) -> None:
    blocks = [*chain(6), block(50, (1_500_000, 900_000)), block(51, (1,))]
    assert await put(stub, blocks, step) == [OK] * 8
    answers = await get(stub, [b.header.key for b in blocks] + [digest(b"unknown")])
    assert list(answers) == list(range(9)), "answers come in the order asked"
    assert answers.pop(8) == (NOT_FOUND, b"")
    for index, (status, blob) in answers.items():
        assert status == OK
        assert EncodedBlock.from_bytes(blob).to_bytes() == blocks[index].to_bytes()


async def test_frames_are_bounded(stub) -> None:
    await put(stub, [block(0, (2_500_000,))])
    sizes = [len(f.payload) async for f in stub.Get(pb.GetRequest(keys=[block(0).header.key]))]
    assert sizes == [2 << 20, 2_500_000 - (2 << 20)]


async def test_small_blocks_can_share_messages(stub) -> None:
    blocks = [block(i, (180_000,)) for i in range(20)]
    each = [next(frames([b])) for b in blocks]
    for index, frame in enumerate(each):
        frame.index = index
    answer = await stub.Put(iter([pb.PutRequest(more=each[:10]), pb.PutRequest(more=each[10:])]))
    assert list(answer.statuses) == [OK] * 20
    keys = [b.header.key for b in blocks]
    messages = [m async for m in stub.Get(pb.GetRequest(keys=[*keys, digest(b"x")], pack=True))]
    assert len(messages) == 2, "2 MiB each"
    got = [f for m in messages for f in (m, *m.more)]
    assert [(f.index, f.status) for f in got] == [*((i, OK) for i in range(20)), (20, NOT_FOUND)]
    assert [EncodedBlock.from_bytes(f.header + f.payload).to_bytes() for f in got[:-1]] == [b.to_bytes() for b in blocks]
    plain = [m async for m in stub.Get(pb.GetRequest(keys=keys))]
    assert len(plain) == 20, "only who asks for it gets packed frames"
    assert not any(m.more for m in plain)


async def test_less_fidelity_on_request_is_a_valid_smaller_block(stub) -> None:
    full = block(0, (100, 200, 300))
    await put(stub, [full])
    answer = await get(stub, [full.header.key], max_fidelity=2)
    assert EncodedBlock.from_bytes(answer[0][1]).to_bytes() == full.truncate(2).to_bytes()


async def test_lookup_lists_and_leases(stub, node: StoreNode) -> None:
    blocks = chain(3)
    await put(stub, blocks)
    keys = [b.header.key for b in blocks]
    found = await stub.Lookup(pb.LookupRequest(keys=[*keys, digest(b"x")], lease_ms=5000))
    assert [b.status for b in found.blocks] == [OK, OK, OK, NOT_FOUND]
    assert found.incarnation == node.record.incarnation
    first = found.blocks[1]
    assert (first.key, first.parent, first.namespace) == (keys[1], keys[0], NAMESPACE)
    assert (first.size_bytes, first.fidelity, first.fidelities, first.start, first.tokens) == (len(blocks[1].to_bytes()), 2, 2, 64, 64)
    assert list((await stub.Evict(pb.EvictRequest(keys=keys))).statuses) == [BUSY] * 3
    await stub.Release(pb.ReleaseRequest(lease_id=found.lease_id))
    await stub.Release(pb.ReleaseRequest(lease_id=found.lease_id))
    assert list((await stub.Evict(pb.EvictRequest(keys=keys))).statuses) == [OK] * 3
    assert list((await stub.Evict(pb.EvictRequest(keys=keys))).statuses) == [NOT_FOUND] * 3


async def test_pins_survive_clear_and_pressure(stub) -> None:
    pinned = block(0, (1 << 20,))
    await put(stub, [pinned])
    key = pinned.header.key
    answer = await stub.Pin(pb.PinRequest(keys=[key, digest(b"x")], ttl_seconds=60))
    assert list(answer.statuses) == [OK, NOT_FOUND]
    assert await put(stub, [block(i, (1 << 20,)) for i in range(1, 9)]) == [OK] * 8
    assert (await get(stub, [key]))[0][0] == OK
    cleared = await stub.Clear(pb.ClearRequest())
    assert (cleared.blocks, cleared.freed_bytes) == (3, 3 << 20)
    assert list((await stub.Unpin(pb.UnpinRequest(keys=[key, key]))).statuses) == [OK, NOT_FOUND]
    assert (await stub.Clear(pb.ClearRequest(namespace=digest(b"another")))).blocks == 0
    assert (await stub.Clear(pb.ClearRequest(namespace=NAMESPACE))).blocks == 1


async def test_pinned_bytes_are_bounded(stub) -> None:
    blocks = [block(i, (1 << 20,)) for i in range(3)]
    await put(stub, blocks)
    answer = await stub.Pin(pb.PinRequest(keys=[b.header.key for b in blocks], ttl_seconds=60))
    assert list(answer.statuses) == [OK, OK, NO_ROOM], "half of the arena"


async def test_list_pages_in_the_order_of_keys(stub) -> None:
    blocks = [block(i, (10,)) for i in range(25)]
    await put(stub, blocks)
    seen, after, pages = [], b"", 0
    while pages == 0 or after:
        page = await stub.List(pb.ListRequest(after=after, limit=10))
        seen += [b.key for b in page.blocks]
        after, pages = page.next, pages + 1
    assert pages == 3
    assert seen == sorted(b.header.key for b in blocks)


async def test_under_pressure_the_oldest_leaves_and_the_account_stays_exact(stub, node: StoreNode) -> None:
    for first in range(0, 20, 5):
        assert await put(stub, chain(5, (200_000, 100_000), first)) == [OK] * 5
    stats = await stub.Stats(pb.StatsRequest())
    assert stats.used_bytes + stats.free_bytes + stats.reserved_bytes == stats.arena_bytes == 4 << 20
    listed = (await stub.List(pb.ListRequest())).blocks
    layers = (200_000, 100_000)
    assert stats.used_bytes == sum(-(-size // stats.page_bytes) * stats.page_bytes for b in listed for size in layers[: b.fidelity])
    assert stats.blocks == len(listed) == 20 - stats.evictions
    assert stats.stored_bytes == sum(b.size_bytes for b in listed)
    assert stats.demotions >= sum(b.fidelities - b.fidelity for b in listed) > 0
    assert stats.raw_bytes == stats.blocks * 64 * 30 * 3 * 64 * 2 * 2
    answers = await get(stub, [b.header.key for b in chain(5, (200_000, 100_000), 15)])
    assert [status for status, _ in answers.values()] == [OK] * 5, "the newest chain is whole"


async def test_a_better_block_replaces_and_a_worse_one_does_not(stub) -> None:
    good, bad = block(0, error=0.1), block(0, error=0.3, salt=1)
    contaminated = block(0, error=0.0, salt=2, provenance=Provenance(1, good.distortion[1]))
    assert await put(stub, [bad]) == [OK]
    assert await put(stub, [good, bad, contaminated, good]) == [OK, EXISTS, EXISTS, EXISTS]
    assert (await get(stub, [good.header.key]))[0][1] == good.to_bytes()


# ---- bad input


async def test_bytes_that_do_not_certify_themselves_are_refused_one_by_one(stub, node: StoreNode) -> None:
    good = chain(5)
    stream = [next(frames([b])) for b in good]
    stream[1].payload = stream[1].payload[:-1] + bytes([stream[1].payload[-1] ^ 1])
    stream[2].payload = stream[2].payload[:-1]
    stream[3].header = stream[3].header[:-1] + bytes([stream[3].header[-1] ^ 1])
    for index, frame in enumerate(stream):
        frame.index = index
    answer = await stub.Put(iter(stream))
    assert list(answer.statuses) == [OK, DATA_LOSS, DATA_LOSS, DATA_LOSS, OK]
    assert [status for status, _ in (await get(stub, [b.header.key for b in good])).values()] == [OK, NOT_FOUND, NOT_FOUND, NOT_FOUND, OK]
    assert node.engine.reserved_bytes == 0
    assert node.metrics.corrupt_blocks.labels(where="put")._value.get() == 3


@pytest.mark.parametrize(
    ("stream", "word"),
    [
        ([pb.PutRequest(index=0, payload=b"x")], "without its header"),
        ([pb.PutRequest(index=1, header=block(0).header.to_bytes())], "was due"),
        ([*frames([block(0)]), pb.PutRequest(index=0, payload=b"x")], "longer than its header says"),
        ([*frames([block(0)]), pb.PutRequest(index=7, payload=b"x")], "without its header"),
        ([pb.PutRequest(index=0, header=b"nonsense"), pb.PutRequest(index=2, header=b"nonsense")], "was due"),
        ([pb.PutRequest(index=0, header=b"h", payload=bytes((4 << 20) + 1))], "at most"),
    ],
)
async def test_frames_out_of_order_end_the_stream(stub, node: StoreNode, stream: list, word: str) -> None:
    code, reason, message = await refusal(stub.Put(iter(stream)))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT")
    assert word in message
    assert node.engine.reserved_bytes == 0


async def test_a_header_that_lies_about_its_size_costs_no_memory(stub, node: StoreNode) -> None:
    honest = block(0, (10,)).header
    lying = replace(honest, rows=(honest.rows[0]._replace(size_bytes=2**31),))
    answer = await stub.Put(iter([pb.PutRequest(index=0, header=lying.to_bytes(), payload=b"x" * 10)]))
    assert list(answer.statuses) == [NO_ROOM]
    assert node.engine.reserved_bytes == 0


async def test_a_put_that_is_cut_off_gives_its_pages_back(stub, node: StoreNode) -> None:
    arrived = asyncio.Event()

    async def halting():
        yield pb.PutRequest(index=0, header=block(0, (500_000,)).header.to_bytes(), payload=b"x" * 1000)
        arrived.set()
        await asyncio.sleep(60)

    call = stub.Put(halting())
    await arrived.wait()
    await until(lambda: node.engine.reserved_bytes)
    seen = await stub.Lookup(pb.LookupRequest(keys=[block(0).header.key]))
    assert [b.status for b in seen.blocks] == [NOT_FOUND], "not visible yet"
    assert await put(stub, [block(0, (500_000,))]) == [BUSY], "one writer a key"
    call.cancel()
    await until(lambda: not node.engine.reserved_bytes)
    node.engine.check()
    assert await put(stub, [block(0, (500_000,))]) == [OK]


async def test_arguments_out_of_range_name_the_mend(stub) -> None:
    many = [digest(bytes([i & 255, i >> 8])) for i in range(256)] * 257
    calls = [
        stub.Lookup(pb.LookupRequest(keys=[b"short"])),
        stub.Lookup(pb.LookupRequest(keys=many)),
        stub.Lookup(pb.LookupRequest(keys=many[:1], lease_ms=60_001)),
        stub.Pin(pb.PinRequest(keys=many[:1], ttl_seconds=0)),
        stub.Pin(pb.PinRequest(keys=many[:1], ttl_seconds=86_401)),
        stub.Evict(pb.EvictRequest(keys=[bytes(33)])),
        stub.Clear(pb.ClearRequest(namespace=b"short")),
        stub.List(pb.ListRequest(limit=10_001)),
    ]
    for call in calls:
        code, reason, message = await refusal(call)
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT")
        assert message
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await get(stub, [b"short"])
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("name", ["Lookup", "Get", "Put", "Pin", "List"])
async def test_bytes_that_are_no_message_are_an_invalid_argument(channel, name: str) -> None:
    path = f"/concertina.kvstore.v1.KVStoreService/{name}"
    nonsense = b"\x0a\xff\xff\xff\x7f"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if name == "Put":
            await channel.stream_unary(path)(iter([nonsense]))
        elif name == "Get":
            await channel.unary_stream(path)(nonsense).read()
        else:
            await channel.unary_unary(path)(nonsense)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# ---- beside the store


async def test_health_and_reflection(channel, node: StoreNode) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "concertina.kvstore.v1.KVStoreService"):
        assert (await health.Check(health_pb2.HealthCheckRequest(service=service))).status == health_pb2.HealthCheckResponse.SERVING
    mirror = reflection_pb2_grpc.ServerReflectionStub(channel)
    answers = mirror.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {s.name for s in (await answers.read()).list_services_response.service}
    assert "concertina.kvstore.v1.KVStoreService" in names


async def test_the_metrics_page_is_the_account(stub, node: StoreNode) -> None:
    await put(stub, chain(4))
    await stub.Evict(pb.EvictRequest(keys=[block(3).header.key]))
    page = await scrape(node.record.metrics)
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    stats = await stub.Stats(pb.StatsRequest())
    for state in ("used", "free", "reserved"):
        assert float(values[f'concertina_arena_bytes{{node="n1",state="{state}"}}']) == getattr(stats, f"{state}_bytes")
    assert float(values['concertina_raw_bytes{node="n1"}']) == stats.raw_bytes
    assert float(values['concertina_blocks{fidelity="2",node="n1"}']) == 3
    assert float(values['concertina_evictions_total{node="n1",policy="lru",reason="request"}']) == 1
    assert float(values['concertina_rpc_seconds_count{rpc="Put"}']) == 1
    assert float(values['concertina_block_distortion_count{node="n1",part="keys"}']) == 4


async def scrape(address: str, path: str = "/metrics") -> str:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200" if path == "/metrics" else b"HTTP/1.1 404")
    return body.decode()


async def test_the_metrics_page_has_no_other_path(node: StoreNode) -> None:
    assert await scrape(node.record.metrics, "/etc/passwd") == ""


async def test_two_nodes_cannot_share_an_address(node: StoreNode) -> None:
    with pytest.raises(ConfigError, match="--listen"):
        await StoreNode(NodeConfig(arena=1 << 20, listen=node.address), InprocMetadata()).start()
    with pytest.raises(ConfigError, match="--metrics"):
        await StoreNode(NodeConfig(arena=1 << 20, metrics=node.record.metrics), InprocMetadata()).start()


class ElsewhereArena(CpuArena):
    """Behaves as memory of another device does: only a copy of it can be read, by a thread."""

    device = "cuda:0"

    def _load(self, start: int, length: int) -> bytes:
        return bytes(super()._load(start, length))


async def test_an_arena_on_another_device_is_copied_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.node.node.create", lambda size, device, page_bytes: ElsewhereArena(size, page_bytes))
    node = StoreNode(NodeConfig(arena=8 << 20, device="cuda"), InprocMetadata())
    await node.start()
    async with grpc.aio.insecure_channel(node.address) as channel:
        stub = rpc.KVStoreServiceStub(channel)
        blocks = [*chain(5), block(9, (3_000_000,))]
        assert await put(stub, blocks, 3 << 20) == [OK] * 6
        answers = await get(stub, [b.header.key for b in blocks])
        assert [blob for _, blob in answers.values()] == [b.to_bytes() for b in blocks]
        damaged = next(frames([block(10, (2_000_000,))], 3 << 20))
        damaged.payload = b"x" + damaged.payload[1:]
        assert list((await stub.Put(iter([damaged]))).statuses) == [DATA_LOSS]
    node.engine.check()
    await node.stop()
