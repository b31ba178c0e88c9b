"""Credentials on a node: a tenant reads, lists, pins, evicts and clears its own blocks alone, and cannot tell that there are others."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from kvstore.block import EncodedBlock
from kvstore.client import ClientConfig, KvClient
from kvstore.client.door import open_door
from kvstore.errors import AuthenticationError, ConfigError, PermissionDeniedError, TransportError
from kvstore.metadata import InprocMetadata, InprocState
from kvstore.node import NodeConfig, StoreNode
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb
from protos.concertina.kvstore.v1 import kvstore_pb2_grpc as rpc
from tests.node_support import NAMESPACE, block, chain, frames
from tests.tls_support import Authority, needs_openssl

OK, NOT_FOUND = pb.BLOCK_STATUS_OK, pb.BLOCK_STATUS_NOT_FOUND
TOKENS = {"team-a": "token of a", "team-b": "token of b", "operators": "token of the operators"}
BLOCKS = chain(3)
KEYS = [one.header.key for one in BLOCKS]


def credentials(tmp_path: Path, **names: str) -> str:
    entries: dict[str, object] = {hashlib.sha256(token.encode()).hexdigest(): tenant for tenant, token in TOKENS.items()}
    entries[hashlib.sha256(TOKENS["operators"].encode()).hexdigest()] = {"tenant": "operators", "admin": True}
    path = tmp_path / "credentials.json"
    path.write_text(json.dumps(entries | {f"san:{name}": tenant for name, tenant in names.items()}))
    return str(path)


class Tenant:
    """Calls with one tenant's token."""

    def __init__(self, channel: grpc.aio.Channel, name: str) -> None:
        self._stub = rpc.KVStoreServiceStub(channel)
        self._metadata = (("authorization", f"Bearer {TOKENS[name]}"),) if name in TOKENS else ()

    async def call(self, name: str, **fields: object):
        return await getattr(self._stub, name)(getattr(pb, f"{name}Request")(**fields), metadata=self._metadata, timeout=10)

    async def put(self, blocks: Sequence[EncodedBlock]) -> list[int]:
        return list((await self._stub.Put(frames(blocks), metadata=self._metadata, timeout=10)).statuses)

    async def get(self, keys: Sequence[bytes]) -> list[bytes]:
        answers = [b""] * len(keys)
        async for frame in self._stub.Get(pb.GetRequest(keys=keys), metadata=self._metadata, timeout=10):
            answers[frame.index] += frame.header + frame.payload
        return answers


@pytest.fixture
def state() -> InprocState:
    return InprocState()


@pytest_asyncio.fixture
async def node(tmp_path: Path, state: InprocState) -> AsyncIterator[StoreNode]:
    spill = {"spill": str(tmp_path / "spill"), "spill_bytes": 8 << 20}
    config = NodeConfig(arena=1 << 20, id="n1", policy="lru", heartbeat_s=0.02, credentials=credentials(tmp_path), **spill)
    one = StoreNode(config, InprocMetadata(state=state))
    await one.start()
    yield one
    one.engine.check()
    one.spill.check()
    await one.stop()


@pytest_asyncio.fixture
async def channel(node: StoreNode) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(node.address) as one:
        yield one


@pytest.fixture
def tenants(channel: grpc.aio.Channel) -> list[Tenant]:
    return [Tenant(channel, name) for name in TOKENS]


@pytest.mark.parametrize("token", ["", "Bearer", "Bearer nobody's", "Basic token of a", "token of a"])
@pytest.mark.parametrize("name", ["Lookup", "Get", "Put", "Release", "Pin", "Unpin", "Evict", "Clear", "List", "Stats"])
async def test_no_call_without_a_known_credential(channel: grpc.aio.Channel, name: str, token: str) -> None:
    stub, metadata = rpc.KVStoreServiceStub(channel), (("authorization", token), ("tenant", "team-a"))[0 if token else 1 :]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if name == "Put":
            await stub.Put(frames(BLOCKS), metadata=metadata, timeout=10)
        elif name == "Get":
            await anext(aiter(stub.Get(pb.GetRequest(keys=KEYS), metadata=metadata, timeout=10)))
        else:
            await getattr(stub, name)(getattr(pb, f"{name}Request")(), metadata=metadata, timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_tenant_has_its_own_blocks_alone(tenants: list[Tenant]) -> None:
    a, b, admin = tenants
    assert await a.put(BLOCKS) == [OK] * 3
    assert await a.get(KEYS) == [one.to_bytes() for one in BLOCKS]
    assert await b.get(KEYS) == [b""] * 3
    assert [seen.status for seen in (await b.call("Lookup", keys=KEYS, lease_ms=1000)).blocks] == [NOT_FOUND] * 3
    assert not (await b.call("List")).blocks
    for name, fields in (("Pin", {"ttl_seconds": 60}), ("Unpin", {}), ("Evict", {})):
        assert list((await b.call(name, keys=KEYS, **fields)).statuses) == [NOT_FOUND] * 3
    for fields in ({}, {"namespace": NAMESPACE}):
        assert (await b.call("Clear", **fields)).blocks == 0
    assert sorted(seen.key for seen in (await a.call("List")).blocks) == sorted(KEYS)
    assert await admin.get(KEYS) == [one.to_bytes() for one in BLOCKS]


async def test_two_tenants_hold_blocks_of_one_key_apart(tenants: list[Tenant], state: InprocState) -> None:
    """Neither learns from an answer that the other has one, nor replaces it."""
    a, b, admin = tenants
    mine, theirs = block(1, salt=1), block(1, salt=2)
    assert await a.put([mine]) == [OK]
    assert await b.put([theirs]) == [OK]
    key = mine.header.key
    assert (await a.get([key]), await b.get([key])) == ([mine.to_bytes()], [theirs.to_bytes()])
    assert len((await admin.call("List")).blocks) == 2
    assert list((await a.call("Evict", keys=[key])).statuses) == [OK]
    assert (await a.get([key]), await b.get([key])) == ([b""], [theirs.to_bytes()])
    await asyncio.sleep(0.1)
    assert key in state.holders, "the index still leads to the other's"
    assert await a.put([mine]) == [OK]
    assert list((await admin.call("Evict", keys=[key])).statuses) == [OK]
    assert await b.get([key]) == [b""]


async def test_nor_once_they_are_spilled(tenants: list[Tenant], node: StoreNode) -> None:
    a, b, admin = tenants
    for number in range(0, 24, 4):
        assert await a.put(chain(4, (60_000, 90_000), first=number)) == [OK] * 4
    keys = [block(number).header.key for number in range(24)]
    assert len(node.engine.table) < 24
    assert all(await a.get(keys))
    assert not any(await b.get(keys))
    assert list((await b.call("Evict", keys=keys)).statuses) == [NOT_FOUND] * 24
    assert (await b.call("Clear")).blocks == 0
    assert all(await admin.get(keys))
    assert (await a.call("Clear")).blocks == 24
    assert not any(await a.get(keys))


async def test_what_tells_of_everybody_is_an_admins(tenants: list[Tenant]) -> None:
    a, _, admin = tenants
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await a.call("Stats")
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "admin" in caught.value.details()
    assert (await admin.call("Stats")).arena_bytes == 1 << 20
    await a.put(BLOCKS)
    assert (await admin.call("Clear")).blocks == 3


async def test_a_lease_is_ended_by_who_knows_it(tenants: list[Tenant], node: StoreNode) -> None:
    a, b, _ = tenants
    await a.put(BLOCKS)
    lease = (await a.call("Lookup", keys=KEYS, lease_ms=60_000)).lease_id
    for guess in range(1, 100):
        await b.call("Release", lease_id=guess)
    assert len(node.engine.holds.leases) == 1
    await a.call("Release", lease_id=lease)
    assert len(node.engine.holds.leases) == 0


async def test_the_client_shows_its_token(tmp_path: Path, node: StoreNode, state: InprocState) -> None:
    async def client(name: str) -> KvClient:
        path = tmp_path / "token"
        path.write_text(TOKENS.get(name, name) + "\n")
        one = KvClient(ClientConfig(credential=str(path)), metadata=InprocMetadata(state=state))
        await one.start()
        return one

    a, b, stranger = [await client(name) for name in ("team-a", "team-b", "nobody")]
    assert a.publish(BLOCKS) == 3
    assert await a.flush()
    async with asyncio.timeout(5):
        while len(await a.lookup(KEYS)) < 3:
            await asyncio.sleep(0.02)
    fetched = [await one.fetch(await one.lookup(KEYS), namespace=NAMESPACE) for one in (a, b, stranger)]
    assert [len(found.blocks) for found in fetched] == [3, 0, 0]
    with pytest.raises(PermissionDeniedError, match="admin"):
        await a.admin.stats(a.nodes()[0])
    with pytest.raises(AuthenticationError):
        await stranger.admin.list(stranger.nodes()[0])
    for one in (a, b, stranger):
        await one.close()


async def test_shared_memory_is_an_admins_where_there_are_tenants(node: StoreNode) -> None:
    """The arena holds everybody's blocks: through the door a tenant is served its own, copied."""
    for name, shared in (("team-a", False), ("operators", True)):
        door = await asyncio.to_thread(open_door, node.record, True, TOKENS[name], 5.0)
        assert (door.arena is not None) == shared
        door.close()
    with pytest.raises((OSError, TransportError)):
        await asyncio.to_thread(open_door, node.record, True, "nobody's", 5.0)


@needs_openssl
async def test_tls_and_certificates(tmp_path: Path, state: InprocState) -> None:
    """Server TLS, mutual TLS, and a tenant by the name in its certificate."""
    ours, others = Authority(tmp_path / "ours"), Authority(tmp_path / "others")
    cert, key = ours.issue("node", "IP:127.0.0.1")
    file = credentials(tmp_path, **{"a.example": "team-a"})
    config = NodeConfig(arena=1 << 20, credentials=file, tls_cert=cert, tls_key=key, tls_client_ca=str(ours.ca), heartbeat_s=0.02)
    node = StoreNode(config, InprocMetadata(state=state))
    await node.start()
    await Tls(node, ours.ca, ours.issue("a", "DNS:a.example")).expect(OK)
    await Tls(node, ours.ca, ours.issue("c", "DNS:c.example")).expect(grpc.StatusCode.UNAUTHENTICATED)
    await Tls(node, ours.ca, ours.issue("c", "DNS:c.example"), "team-b").expect(OK)
    for wrong in (Tls(node, ours.ca), Tls(node, ours.ca, others.issue("a", "DNS:a.example")), Tls(node, others.ca)):
        await wrong.expect(grpc.StatusCode.UNAVAILABLE)
    async with grpc.aio.insecure_channel(node.address) as plain:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await Tenant(plain, "team-a").call("List")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await node.stop()


class Tls:
    """A client with these files."""

    def __init__(self, node: StoreNode, ca: Path, own: tuple[str, str] = ("", ""), token: str = "") -> None:
        self._config = ClientConfig(tls_ca=str(ca), tls_cert=own[0], tls_key=own[1], rpc_timeout_s=5.0)
        self._node, self._token = node, token

    async def expect(self, outcome: object) -> None:
        from kvstore.client.security import Security
        from kvstore.client.transport import CHANNEL_OPTIONS

        async with Security.of(self._config).channel(self._node.address, CHANNEL_OPTIONS) as channel:
            try:
                await Tenant(channel, self._token).call("List")
                assert outcome == OK
            except grpc.aio.AioRpcError as error:
                assert error.code() is outcome


@pytest.mark.parametrize(
    "settings",
    [{"tls_cert": "x"}, {"tls_client_ca": "x"}, {"spill": "x"}, {"spill_bytes": 5}],
)
def test_settings_that_belong_together(settings: dict) -> None:
    with pytest.raises(ConfigError, match="together"):
        NodeConfig(**settings)


async def test_files_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    junk.write_text("{}")
    for settings in ({"tls_cert": str(junk), "tls_key": str(junk)}, {"credentials": str(junk)}, {"tls_cert": "/none", "tls_key": "/none"}):
        with pytest.raises(ConfigError):
            await StoreNode(NodeConfig(arena=1 << 20, **settings), InprocMetadata()).start()
