"""The connection to Redis against servers that answer late, wrongly, too much, or not at all."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from kvstore.errors import AuthenticationError, CapacityError, ConfigError, DeadlineError, PermissionDeniedError, TransportError
from kvstore.metadata import connect
from kvstore.metadata.resp import Endpoint, RespConnection, open_connection, pack

KEY = b"k" * 32
HOLDER = bytes.fromhex("ab" * 8) + (123).to_bytes(4, "little") + b"\x02"


@asynccontextmanager
async def server(answer):
    """A server that calls ``answer(writer, words)`` for each command."""
    tasks, writers = set(), []

    async def serve(reader, writer):
        tasks.add(asyncio.current_task())
        writers.append(writer)
        while line := await reader.readline():
            words = []
            for _ in range(int(line[1:])):
                size = int((await reader.readline())[1:])
                words.append((await reader.readexactly(size + 2))[:-2])
            await answer(writer, words)

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        for writer in writers:
            writer.close()
        await asyncio.gather(*tasks, return_exceptions=True)


def scripted(reply_to_mget):
    """Answers the handshake as a single Redis does, and every MGET with the given bytes."""

    async def answer(writer, words):
        if words[0] == b"CLUSTER":
            writer.write(b"-ERR This instance has cluster support disabled\r\n")
        else:
            writer.write(reply_to_mget if words[0] == b"MGET" else b"+OK\r\n")

    return answer


async def locate(reply, timeout_s=1.0):
    async with server(scripted(reply)) as port:
        metadata = connect(f"redis://127.0.0.1:{port}/0", timeout_s=timeout_s)
        try:
            return await asyncio.wait_for(metadata.locate([KEY]), 5)
        finally:
            await metadata.close()


async def test_a_holder_is_unpacked():
    assert await locate(b"*1\r\n$13\r\n" + HOLDER + b"\r\n") == [(("ab" * 8, 123, 2),)]


@pytest.mark.parametrize(
    "value",
    [b"$-1\r\n", b"$0\r\n\r\n", b"$12\r\n" + HOLDER[:12] + b"\r\n", b"$65\r\n" + 5 * HOLDER + b"\r\n", b":7\r\n", b"*1\r\n$1\r\nx\r\n"],
    ids=["nil", "empty", "cut", "five holders", "number", "array"],
)
async def test_a_value_that_is_not_ours_is_no_holder(value):
    assert await locate(b"*1\r\n" + value) == [()]


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b"-NOAUTH Authentication required.\r\n", AuthenticationError),
        (b"-NOPERM no permissions\r\n", PermissionDeniedError),
        (b"-OOM command not allowed\r\n", CapacityError),
        (b"-LOADING Redis is loading\r\n", TransportError),
        (b"-WRONGTYPE Operation against a key\r\n", TransportError),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", TransportError),
        (b"+OK\r\n", TransportError),
        (b"*2\r\n$-1\r\n$-1\r\n", TransportError),
        (b"*1\r\n$-1\r\n+OK\r\n+OK\r\n", None),
        (b"", DeadlineError),
    ],
)
async def test_what_redis_cannot_answer_is_an_error_of_ours(reply, error):
    if error is None:  # answers nobody asked for end the connection; the call itself was answered
        assert await locate(reply) == [()]
        return
    with pytest.raises(error):
        await locate(reply, timeout_s=0.2 if not reply else 2)


async def test_a_late_answer_is_never_given_to_somebody_else():
    release = asyncio.Event()

    async def answer(writer, words):
        if words[1] == b"first":
            await release.wait()
        writer.write(b"$%d\r\n%b\r\n" % (len(words[1]), words[1]))

    async with server(answer) as port:
        connection = await open_connection(Endpoint(port=port), [])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(connection.submit(pack("GET", "first"), 1), 0.05)
        second = connection.submit(pack("GET", "second") + pack("GET", "third"), 2)
        release.set()
        assert await asyncio.wait_for(second, 5) == [b"second", b"third"]
        connection.abort()


async def test_after_a_deadline_the_connection_is_given_up_and_a_new_one_answers():
    connections = set()

    async def answer(writer, words):
        connections.add(writer)
        if words[0] == b"CLUSTER":
            writer.write(b"-ERR cluster support disabled\r\n")
        elif words[0] != b"MGET" or len(connections) > 1:
            writer.write(b"*1\r\n$13\r\n" + HOLDER + b"\r\n" if words[0] == b"MGET" else b"+OK\r\n")

    async with server(answer) as port:
        metadata = connect(f"redis://127.0.0.1:{port}/0", timeout_s=0.2)
        with pytest.raises(DeadlineError):
            await metadata.locate([KEY])
        assert len((await metadata.locate([KEY]))[0]) == 1
        assert len(connections) == 2
        await metadata.close()


async def test_a_connection_that_breaks_fails_everyone_who_waits():
    async def answer(writer, words):
        writer.close()

    async with server(answer) as port:
        connection = await open_connection(Endpoint(port=port), [])
        futures = [connection.submit(pack("GET", str(i)), 1) for i in range(3)]
        for outcome in await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 5):
            assert isinstance(outcome, TransportError)
        with pytest.raises(TransportError):
            connection.submit(pack("PING"), 1)


def cluster_of(ports):
    """Answers CLUSTER SLOTS with one owner of all slots, the port in ``ports[0]``, and GET with a holder."""

    async def answer(writer, words):
        if words[0] == b"CLUSTER":
            writer.write(b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$9\r\n127.0.0.1\r\n:%d\r\n" % ports[0])
        else:
            writer.write(b"$13\r\n" + HOLDER + b"\r\n" if words[0] == b"GET" else b"+OK\r\n")

    return answer


async def test_after_a_failover_the_new_owner_is_found():
    ports = [1]  # nobody listens there
    async with server(cluster_of(ports)) as seed, server(cluster_of(ports)) as heir:
        metadata = connect(f"redis://127.0.0.1:{seed}/0", timeout_s=2)
        for _ in range(2):
            with pytest.raises(TransportError):
                await metadata.locate([KEY])
        ports[0] = heir
        assert len((await metadata.locate([KEY]))[0]) == 1
        await metadata.close()


async def test_the_cluster_is_found_again_when_the_member_in_the_url_is_gone():
    ports = [0]
    async with server(cluster_of(ports)) as heir:
        ports[0] = heir
        async with server(cluster_of(ports)) as seed:
            metadata = connect(f"redis://127.0.0.1:{seed}/0", timeout_s=2)
            assert len((await metadata.locate([KEY]))[0]) == 1
        metadata.shards._drop(set(metadata.shards._connections))
        assert len((await metadata.locate([KEY]))[0]) == 1
        await metadata.close()


async def test_a_demoted_server_is_connected_to_anew():
    connections = set()

    async def answer(writer, words):
        connections.add(writer)
        if words[0] == b"CLUSTER":
            writer.write(b"-ERR cluster support disabled\r\n")
        elif words[0] == b"SET" and len(connections) == 1:
            writer.write(b"-READONLY You can't write against a read only replica.\r\n")
        else:
            writer.write(b"+OK\r\n")

    async with server(answer) as port:
        metadata = connect(f"redis://127.0.0.1:{port}/0", timeout_s=2)
        with pytest.raises(TransportError, match="READONLY"):
            await metadata.set_value("a", b"b")
        await metadata.set_value("a", b"b")
        await metadata.close()


async def test_a_wrong_password_is_named():
    async def answer(writer, words):
        writer.write(b"-WRONGPASS invalid username-password pair\r\n")

    async with server(answer) as port:
        metadata = connect(f"redis://user:bad@127.0.0.1:{port}/0", timeout_s=2)
        with pytest.raises(AuthenticationError, match="WRONGPASS"):
            await metadata.nodes()
        await metadata.close()


async def test_calls_after_close_are_refused():
    metadata = connect("redis://127.0.0.1:1/0")
    await metadata.close()
    await metadata.close()
    with pytest.raises(TransportError, match="closed"):
        await metadata.nodes()


@pytest.mark.parametrize("url", ["http://x", "", "redis://h:port", "redis://h/0?bogus=1", "rediss://h/0?ssl_ca_certs=/nowhere"])
def test_urls_that_cannot_work_are_refused(url):
    with pytest.raises(ConfigError):
        connect(url)


@pytest.mark.parametrize("prefix", ["", "{a}", "a b"])
def test_prefixes_that_would_not_spread_are_refused(prefix):
    with pytest.raises(ConfigError, match="prefix"):
        connect("redis://127.0.0.1/0", prefix)


def test_endpoints_are_read_from_urls():
    endpoint = Endpoint.from_url("redis://me:p%40ss@10.0.0.1:7000/3")
    assert (endpoint.host, endpoint.port, endpoint.username, endpoint.password, endpoint.db) == ("10.0.0.1", 7000, "me", "p@ss", 3)
    assert "p@ss" not in repr(endpoint)
    assert Endpoint.from_url("unix:///run/redis.sock").path == "/run/redis.sock"
    assert Endpoint.from_url("rediss://h/0?ssl_cert_reqs=none").tls is not None


def test_a_connection_that_was_never_made_takes_no_commands():
    with pytest.raises(TransportError):
        RespConnection().submit(pack("PING"), 1)
