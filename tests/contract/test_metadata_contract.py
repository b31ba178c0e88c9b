"""One suite for every metadata backend: in-process, a real Valkey, and a real cluster of three."""

from __future__ import annotations

import asyncio
import random

import pytest

from kvstore.errors import DeadlineError, InvalidInputError, TransportError
from kvstore.metadata import IndexEntry, InprocMetadata, NodeRecord, WorkerRecord, connect
from kvstore.metadata.base import MAX_HOLDERS, MAX_VALUE_BYTES
from kvstore.metadata.embedded import start_valkey
from tests.valkey_support import redis_cluster

A, B = "a1" * 8, "b2" * 8


@pytest.fixture(scope="module")
def valkey(tmp_path_factory):
    server = start_valkey(tmp_path_factory.mktemp("valkey"), password="secret")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as servers:
        yield servers[0]


@pytest.fixture(params=["inproc", "valkey", "cluster"])
async def metadata(request):
    if request.param == "inproc":
        yield InprocMetadata()
        return
    server = request.getfixturevalue(request.param)
    backend = connect(server.url, prefix=f"t{random.getrandbits(64):x}", timeout_s=5)
    yield backend
    await backend.close()


def keys_of(count, seed=0):
    rng = random.Random(seed)
    return [rng.randbytes(32) for _ in range(count)]


def node(incarnation, **fields):
    return NodeRecord(**{"id": incarnation[:2], "incarnation": incarnation, "address": f"{incarnation[:2]}:1", **fields})


async def test_unknown_keys_have_no_holders(metadata):
    assert await metadata.locate(keys_of(3)) == [(), (), ()]
    assert await metadata.locate([]) == []


async def test_announced_blocks_are_located_in_the_order_asked(metadata):
    keys = keys_of(700)
    await metadata.announce(A, [IndexEntry(k, 1000 + i, 1 + i % 4) for i, k in enumerate(keys)])
    asked = keys[::-1]
    found = await metadata.locate(asked)
    assert [f[0] for f in found] == [(A, 1000 + keys.index(k), 1 + keys.index(k) % 4) for k in asked]


async def test_neighbours_in_one_bucket_do_not_mix(metadata):
    keys = [bytes(4) + k[4:] for k in keys_of(200)]
    await metadata.announce(A, [IndexEntry(k, i + 1, 1) for i, k in enumerate(keys)])
    assert [f[0].size_bytes for f in await metadata.locate(keys)] == list(range(1, 201))
    await metadata.withdraw(A, keys[::2])
    assert [len(f) for f in await metadata.locate(keys)] == [0, 1] * 100


async def test_a_block_has_several_holders_and_loses_them_one_by_one(metadata):
    (key,) = keys_of(1)
    await metadata.announce(A, [IndexEntry(key, 10, 1)])
    await metadata.announce(B, [IndexEntry(key, 20, 2)])
    assert set((await metadata.locate([key]))[0]) == {(A, 10, 1), (B, 20, 2)}
    await metadata.withdraw(A, [key])
    assert (await metadata.locate([key]))[0] == ((B, 20, 2),)
    await metadata.withdraw(B, [key])
    assert await metadata.locate([key]) == [()]


async def test_announcing_again_replaces(metadata):
    (key,) = keys_of(1)
    await metadata.announce(A, [IndexEntry(key, 40, 4)])
    await metadata.announce(A, [IndexEntry(key, 10, 1)])
    assert await metadata.locate([key]) == [((A, 10, 1),)]


async def test_holders_are_bounded_and_the_newest_is_kept(metadata):
    (key,) = keys_of(1)
    incarnations = [f"{i:016x}" for i in range(MAX_HOLDERS + 3)]
    for incarnation in incarnations:
        await metadata.announce(incarnation, [IndexEntry(key, 2**31, 8)])
    (found,) = await metadata.locate([key])
    assert [f.incarnation for f in found] == incarnations[: -MAX_HOLDERS - 1 : -1]


async def test_withdrawing_what_was_never_announced_is_harmless(metadata):
    key, other = keys_of(2)
    await metadata.announce(A, [IndexEntry(key, 10, 1)])
    await metadata.withdraw(B, [key, other])
    assert await metadata.locate([key, other]) == [((A, 10, 1),), ()]


@pytest.mark.parametrize("key", [b"", b"short", bytes(31), bytes(33)], ids=len)
async def test_cut_keys_are_refused(metadata, key):
    for call in (metadata.locate([key]), metadata.announce(A, [IndexEntry(key, 1, 1)]), metadata.withdraw(A, [key])):
        with pytest.raises(InvalidInputError, match="32 bytes"):
            await call


@pytest.mark.parametrize("incarnation", ["", "a1", "zz" * 8, "a1" * 9, " a1" * 5])
async def test_malformed_incarnations_are_refused(metadata, incarnation):
    record = NodeRecord("n", incarnation, "n:1")
    for call in (metadata.announce(incarnation, []), metadata.withdraw(incarnation, []), metadata.heartbeat(record, 1)):
        with pytest.raises(InvalidInputError, match="16 hexadecimal"):
            await call


async def test_membership_by_heartbeat(metadata):
    first, second = node(A, started=1.0, arena_bytes=1 << 30, blocks=3), node(B, metrics="127.0.0.1:9")
    assert await metadata.heartbeat(first, 5) is False
    assert await metadata.heartbeat(first, 5) is True
    assert await metadata.heartbeat(second, 5) is False
    assert await metadata.nodes() == [first, second]
    await metadata.leave(first)
    assert await metadata.nodes() == [second]
    assert await metadata.heartbeat(first, 5) is False


async def test_a_silent_node_expires_and_must_announce_again(metadata):
    assert await metadata.heartbeat(node(A), 0.05) is False
    await asyncio.sleep(0.1)
    assert await metadata.nodes() == []
    assert await metadata.heartbeat(node(A), 5) is False
    assert await metadata.nodes() == [node(A)]


async def test_a_restarted_node_hides_its_earlier_incarnation(metadata):
    await metadata.heartbeat(node(A, id="n", address="h:1", started=1.0), 5)
    await metadata.heartbeat(node(B, id="n", address="h:1", started=2.0), 5)
    assert [n.incarnation for n in await metadata.nodes()] == [B]


async def test_workers(metadata):
    w = WorkerRecord("w-1", "127.0.0.1:9000", http="http://127.0.0.1:8000", pid=7, engine="transformers", model="m", codec="int8")
    await metadata.heartbeat_worker(w, 5)
    await metadata.heartbeat_worker(WorkerRecord("w-0", "127.0.0.1:9001"), 5)
    assert await metadata.workers() == [WorkerRecord("w-0", "127.0.0.1:9001"), w]
    await metadata.leave_worker("w-0")
    await metadata.heartbeat_worker(w, 0.05)
    await asyncio.sleep(0.1)
    assert await metadata.workers() == []


async def test_values(metadata):
    assert await metadata.get_value("profile:m") is None
    await metadata.set_value("profile:m", b"\x00digest")
    assert await metadata.get_value("profile:m") == b"\x00digest"
    with pytest.raises(InvalidInputError):
        await metadata.set_value("big", bytes(MAX_VALUE_BYTES + 1))
    with pytest.raises(InvalidInputError):
        await metadata.set_value("", b"x")


async def test_one_of_many_gets_a_claim_until_it_is_given_up_or_expires(metadata):
    first, second, third = keys_of(3)
    assert await metadata.claim([first, second], 60) == [True, True]
    assert await metadata.claim([second, third], 0.05) == [False, True]
    await metadata.unclaim([second])
    assert await metadata.claim([first, second], 60) == [False, True]
    await asyncio.sleep(0.1)
    assert await metadata.claim([third], 60) == [True]
    with pytest.raises(InvalidInputError):
        await metadata.claim([b"short"], 1)


async def test_an_absent_backend_is_an_error_of_ours_not_a_hang():
    away, slow = InprocMetadata(), InprocMetadata()
    away.state.away, slow.state.slow = True, True
    gone = connect("redis://127.0.0.1:1/0", timeout_s=0.5)
    for backend, error in ((away, TransportError), (slow, DeadlineError), (gone, TransportError)):
        entries = [IndexEntry(bytes(32), 1, 1)]
        for call in (backend.locate(keys_of(1)), backend.nodes(), backend.heartbeat(node(A), 1), backend.announce(A, entries)):
            with pytest.raises(error):
                await asyncio.wait_for(call, 5)
    await gone.close()


async def test_a_scan_finds_every_entry_once(metadata):
    keys = keys_of(300, seed=5)
    await metadata.announce(A, [IndexEntry(k, 7, 1) for k in keys])
    await metadata.announce(B, [IndexEntry(k, 8, 2) for k in keys[:50]])
    found, cursor, parts = [], 0, 0
    while cursor or not parts:
        entries, cursor = await metadata.scan(cursor, 70)
        found += entries
        parts += 1
    assert parts > 1
    assert sorted(key for key, _ in found) == sorted(keys)
    assert dict(found) == dict(zip(keys, await metadata.locate(keys), strict=True))
