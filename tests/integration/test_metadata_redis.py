"""What is particular to Redis: the layout's size, lost shards, moved slots, forgotten scripts, and the server of our own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import ssl
import stat
import subprocess
from pathlib import Path

import pytest
import redis

from kvstore.errors import AuthenticationError, ConfigError, TransportError
from kvstore.metadata import IndexEntry, NodeRecord, connect
from kvstore.metadata.embedded import start_valkey
from tests.valkey_support import SHARE, redis_cluster

A = "a1" * 8
NODE = NodeRecord("a", A, "a:1")


@pytest.fixture
def valkey(tmp_path):
    server = start_valkey(tmp_path)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as servers:
        yield servers


@pytest.mark.parametrize("holders", [1, 4])
async def test_an_index_costs_less_than_200_bytes_a_block(valkey, holders):
    metadata = connect(valkey.url, timeout_s=5)
    rng = random.Random(2)
    entries = [IndexEntry(rng.randbytes(32), 100_000, 1) for _ in range(30_000)]
    with redis.Redis(port=valkey.port) as direct:
        await metadata.locate([bytes(32)])
        before = direct.info("memory")["used_memory"]
        for i in range(holders):
            await metadata.announce(f"{i:016x}", entries)
        assert (direct.info("memory")["used_memory"] - before) / len(entries) < 200
    await metadata.close()


async def test_scripts_that_the_server_forgot_are_sent_again(valkey):
    metadata = connect(valkey.url, timeout_s=5)
    keys = [os.urandom(32) for _ in range(3)]
    await metadata.announce(A, [IndexEntry(keys[0], 1, 1)])
    with redis.Redis(port=valkey.port) as direct:
        direct.script_flush()
    await metadata.announce(A, [IndexEntry(k, 2, 1) for k in keys])
    assert [p[0].size_bytes for p in await metadata.locate(keys)] == [2, 2, 2]
    await metadata.close()


async def test_lost_state_is_noticed_by_the_next_heartbeat(valkey):
    metadata = connect(valkey.url, timeout_s=5)
    assert [await metadata.heartbeat(NODE, 30) for _ in range(3)] == [False, True, True]
    with redis.Redis(port=valkey.port) as direct:
        direct.flushall()
    assert [await metadata.heartbeat(NODE, 30) for _ in range(2)] == [False, True]
    await metadata.close()


async def test_the_loss_of_any_one_shard_is_noticed(cluster):
    metadata = connect(cluster[0].url, prefix="loss", timeout_s=5)
    await metadata.heartbeat(NODE, 30)
    for server in cluster:
        assert await metadata.heartbeat(NODE, 30) is True
        with redis.Redis(port=server.port) as direct:
            direct.flushall()
        assert await metadata.heartbeat(NODE, 30) is False
    await metadata.close()


async def test_an_index_spreads_over_all_shards_and_is_read_in_one_round(cluster):
    metadata = connect(cluster[0].url, prefix="spread", timeout_s=5)
    rng = random.Random(3)
    keys = [rng.randbytes(32) for _ in range(600)]
    await metadata.announce(A, [IndexEntry(k, 1, 1) for k in keys])
    for server in cluster:
        with redis.Redis(port=server.port) as direct:
            assert 100 < len(direct.keys("spread:b:*")) < 300
    before = metadata.shards.round_trips
    assert all(await metadata.locate(keys))
    assert metadata.shards.round_trips - before == 3  # one to each shard, side by side
    await metadata.close()


async def test_slots_that_move_are_followed(cluster):
    """An empty slot goes from the first shard to the second while a client knows the old owner."""
    metadata = connect(cluster[0].url, prefix="moves", timeout_s=5)
    await metadata.nodes()
    members = [redis.Redis(port=s.port) for s in cluster]
    rng = random.Random(4)
    keys = (rng.randbytes(32) for _ in range(10_000))
    slot_of = members[0].cluster
    key, slot = next((k, s) for k in keys if (s := slot_of("KEYSLOT", metadata._block_name(k))) < SHARE)
    target = members[1].execute_command("CLUSTER", "MYID").decode()
    source = members[0].execute_command("CLUSTER", "MYID").decode()
    for member in (members[1], members[0], members[2]):
        member.execute_command("CLUSTER", "SETSLOT", slot, "NODE", target)
    await metadata.announce(A, [IndexEntry(key, 5, 1)])
    assert await metadata.locate([key]) == [((A, 5, 1),)]
    assert members[1].exists(metadata._block_name(key))
    # And while it moves back: what is there already is found by ASK.
    members[0].execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", target)
    members[1].execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", source)
    members[1].execute_command("MIGRATE", "127.0.0.1", cluster[0].port, metadata._block_name(key), 0, 5000)
    assert await metadata.locate([key]) == [((A, 5, 1),)]
    for member in (members[0], members[1], members[2]):
        member.execute_command("CLUSTER", "SETSLOT", slot, "NODE", source)
        member.close()
    await metadata.close()


async def test_password_and_users(tmp_path):
    server = start_valkey(tmp_path, password="letmein")
    try:
        with redis.Redis(port=server.port, password="letmein") as direct:
            # All that nodes and clients need.
            rules = ["~concertina:*", "+get", "+mget", "+set", "+del", "+scan", "+sadd", "+srem", "+smembers"]
            direct.execute_command("ACL", "SETUSER", "node", "on", ">pw", "resetkeys", "-@all", *rules, "+eval", "+evalsha", "+script|load")
        metadata = connect(f"redis://node:pw@127.0.0.1:{server.port}/0", timeout_s=5)
        key = os.urandom(32)
        await metadata.announce(A, [IndexEntry(key, 5, 1)])
        assert await metadata.heartbeat(NODE, 5) is False
        assert await metadata.nodes() == [NODE]
        assert len((await metadata.locate([key]))[0]) == 1
        assert [name for name, _ in (await metadata.scan(0, 100))[0]] == [key]
        await metadata.withdraw(A, [key])
        await metadata.leave(NODE)
        await metadata.close()
        without = connect(f"redis://127.0.0.1:{server.port}/0", timeout_s=5)
        with pytest.raises(AuthenticationError):
            await without.nodes()
        await without.close()
    finally:
        server.stop()


def test_the_embedded_server_keeps_to_itself(tmp_path):
    server = start_valkey(tmp_path / "own", password="secret")
    with redis.Redis(port=server.port, password="secret") as direct:
        settings = direct.config_get("*")
        wanted = {"bind": "127.0.0.1", "save": "", "appendonly": "no", "maxmemory-policy": "noeviction"}
        assert {name: settings[name] for name in wanted} == wanted
    assert stat.S_IMODE(os.stat(tmp_path / "own" / "valkey.conf").st_mode) == 0o600
    assert "secret" not in Path(f"/proc/{server.pid}/cmdline").read_text()
    server.stop()
    server.stop()
    assert server.poll() == 0
    assert sorted(p.name for p in (tmp_path / "own").iterdir()) == ["valkey.conf", "valkey.log"]


def test_a_taken_port_is_named_and_nothing_stays_behind(valkey, tmp_path):
    with pytest.raises(ConfigError, match=rf"(?s)port {valkey.port}.*in use"):
        start_valkey(tmp_path / "second", valkey.port)
    with pytest.raises(ConfigError, match="letters and digits"):
        start_valkey(tmp_path / "third", password='a"b')


def test_a_server_that_hangs_is_killed_by_stop(tmp_path):
    server = start_valkey(tmp_path)
    os.kill(server.pid, signal.SIGSTOP)
    server.stop(timeout_s=0.1)
    assert server.poll() == -signal.SIGKILL


@pytest.fixture
def certificate(tmp_path):
    """A self-signed certificate for 127.0.0.1 and its key, as paths."""
    place = tmp_path / "tls"
    place.mkdir()
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(place / "key.pem"), "-out", str(place / "cert.pem")]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, *files]
    subprocess.run(command, check=True, capture_output=True)
    return place / "cert.pem", place / "key.pem"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
async def test_tls_verifies_the_server(valkey, certificate):
    """A TLS endpoint in front of the server (whose build may lack TLS)."""
    cert, key = certificate
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)

    async def pump(reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    async def relay(reader, writer):
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", valkey.port)
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    listener = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context)
    address = f"rediss://127.0.0.1:{listener.sockets[0].getsockname()[1]}/0"
    trusted = connect(f"{address}?ssl_ca_certs={cert}", timeout_s=5)
    await trusted.announce(A, [IndexEntry(bytes(32), 5, 1)])
    assert await trusted.locate([bytes(32)]) == [((A, 5, 1),)]
    await trusted.close()
    untrusting = connect(address, timeout_s=5)
    with pytest.raises(TransportError, match=r"(?i)certificate"):
        await untrusting.nodes()
    await untrusting.close()
    careless = connect(f"{address}?ssl_cert_reqs=none", timeout_s=5)
    assert await careless.nodes() == []
    await careless.close()
    listener.close()
