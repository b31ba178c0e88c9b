"""Hostile input: nonsense at every entrance, sizes that lie, thousands of idle connections, one client against another."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import socket
import sys
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from kvstore.client import ClientConfig, GrpcTransport, KvClient
from kvstore.client.frames import MAX_PACKED, parse_get, put_messages
from kvstore.errors import ConcertinaError, InvalidInputError, TransportError
from kvstore.metadata import InprocMetadata
from kvstore.node import NodeConfig, StoreNode
from kvstore.node.wire import get_frame, parse_put
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb
from tests.fault.blocks import NAMESPACE, chain
from tests.fault.hostile import NO_TEXT, Assault, Fuzz

IDLE_CONNECTIONS = 10_000
MIB = 1 << 20


@asynccontextmanager
async def store(arena: int = 16 * MIB, **config):
    """A node and the metadata that it tells of itself."""
    metadata = InprocMetadata()
    node = StoreNode(NodeConfig(arena=arena, **config), metadata)
    await node.start()
    try:
        yield node, metadata
    finally:
        await node.stop()


@asynccontextmanager
async def node_process():
    """A node in a process of its own, and its address."""
    command = [sys.executable, "-m", "services.cli", "node", "--arena", "16MiB"]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL)
    try:
        yield process, json.loads(await asyncio.wait_for(process.stdout.readline(), 60))["address"]
    finally:
        process.kill()
        await process.wait()


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def test_every_rpc_and_the_door_answer_nonsense_with_a_status_and_nothing_is_left_behind():
    async with store(put_timeout_s=3.0) as (node, _):
        assault = Assault(node, 1)
        await assault.round()
        before = rss_bytes()
        for _ in range(60):
            await assault.round()
            node.engine.check()
        assert not assault.forbidden
        assert rss_bytes() - before < 64 * MIB
        assert assault.answers["Put", "OK"]  # some of it made sense: the fuzzing reaches past the parser
        assert assault.answers["Get", "OK"]
        await assault.close()
        async with asyncio.timeout(10):
            while node.engine.reserved_pages or len(node.engine.holds.leases):
                await asyncio.sleep(0.02)


async def test_connections_that_make_no_sense_end_no_node():
    """Not even a path that is no text, for which gRPC ends its server: 60 bytes from anybody. Callers must find another in its place.

    The node is a process of its own: a server that ends so takes callers in the same process along.
    """
    fuzz = Fuzz(1)
    async with node_process() as (process, address):
        host, _, port = address.rpartition(":")
        transport = GrpcTransport()
        for said in (NO_TEXT, NO_TEXT, *(fuzz.connection() for _ in range(300)), NO_TEXT):
            async with asyncio.timeout(5):
                while not await connect_and_say(host, int(port), said):
                    await asyncio.sleep(0.05)
            if said == NO_TEXT:
                async with asyncio.timeout(5):
                    while not await answers(transport, address):
                        await asyncio.sleep(0.05)
        async with asyncio.timeout(5):
            while not await answers(transport, address):
                await asyncio.sleep(0.05)
        assert process.returncode is None
        await transport.close()


async def connect_and_say(host: str, port: int, said: bytes) -> bool:
    """Whether somebody listens there. What is said is left unanswered for at most a moment."""
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError:
        return False
    with suppress(OSError, TimeoutError):
        writer.write(said)
        async with asyncio.timeout(0.02):
            while await reader.read(4096):
                pass
    writer.transport.abort()
    return True


async def answers(transport: GrpcTransport, address: str) -> bool:
    """Whether a node answers a call."""
    try:
        return (await transport.call(address, "Stats", pb.StatsRequest(), 1.0)).arena_bytes == 16 * MIB
    except ConcertinaError:
        return False


@pytest.mark.parametrize("seed", range(20))
def test_frame_parsers_answer_any_bytes_with_frames_or_a_typed_error(seed):
    fuzz = Fuzz(seed)
    gets = [get_frame(i, 1, b"h" * 200, [b"x" * 900]) for i in range(3)]
    for parse, messages, error in ((parse_put, fuzz.puts, InvalidInputError), (parse_get, gets, TransportError)):
        for _ in range(300):
            damaged = fuzz.damaged(fuzz.rng.choice(messages))
            try:
                frames = parse(damaged)
            except error:
                continue
            assert sum(len(frame.payload) for frame in frames) <= len(damaged)


def test_a_message_with_too_many_frames_is_refused():
    with pytest.raises(TransportError, match="frames"):
        parse_get(b"\x2a\x00" * (MAX_PACKED + 1))


@pytest.mark.parametrize("claimed", [2**31 - 1, 2**32 - 1])
async def test_a_size_that_lies_is_refused_before_memory_is_set_aside(claimed):
    async with store() as (node, _):
        block = chain(1, 1, 3000)[0]
        before = rss_bytes()
        (message,) = put_messages([(block, 0)])
        at = message.index(b"KVCB")
        for field in range(at + 12, at + 200, 4):  # every word of the header in turn: its CRC, and sizes, must stop it
            lying = message[:field] + (claimed).to_bytes(4, "little") + message[field + 4 :]
            try:
                response = await GrpcTransport().put(node.address, [lying], 5.0)
                assert pb.BLOCK_STATUS_OK not in response.statuses or lying == message
            except ConcertinaError:
                continue
        assert node.engine.used_bytes == 0
        assert rss_bytes() - before < 32 * MIB


async def test_ten_thousand_idle_connections_do_not_keep_a_client_out():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = IDLE_CONNECTIONS + 500
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"a process may open {hard} files here, {wanted} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    crowd: list[socket.socket] = []
    try:
        async with node_process() as (_, address):
            host, _, port = address.rpartition(":")
            for _ in range(IDLE_CONNECTIONS):
                crowd.append(socket.create_connection((host, int(port)), 10))
                if len(crowd) % 200 == 0:
                    await asyncio.sleep(0)
            blocks, transport = chain(1, 4), GrpcTransport()
            response = await transport.put(address, put_messages((block, 0) for block in blocks), 20.0)
            assert list(response.statuses) == [pb.BLOCK_STATUS_OK] * 4
            found = await transport.call(address, "Lookup", pb.LookupRequest(keys=[b.header.key for b in blocks]), 20.0)
            assert [block.status for block in found.blocks] == [pb.BLOCK_STATUS_OK] * 4
            await transport.close()
    finally:
        for one in crowd:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_node_that_is_slow_to_accept_is_no_dead_one():
    async with node_process() as (process, address):
        process.send_signal(signal.SIGSTOP)
        transport = GrpcTransport()
        call = asyncio.create_task(transport.call(address, "Lookup", pb.LookupRequest(keys=[chain(1, 1)[0].header.key]), 20.0))
        await asyncio.sleep(1.5)
        process.send_signal(signal.SIGCONT)
        assert [block.status for block in (await call).blocks] == [pb.BLOCK_STATUS_NOT_FOUND]
        await transport.close()


@pytest.mark.parametrize("paths", ["", "local,tcp"], ids=["gRPC", "door"])
async def test_a_flood_and_a_trickle_both_get_on(paths):
    async with store(64 * MIB) as (_, metadata):
        clients = [KvClient(ClientConfig(paths=paths), metadata=metadata) for _ in range(3)]
        for client in clients:
            await client.start()
        small, large = chain(1, 2, 2000), chain(2, 24, 500_000)
        for client, blocks in zip(clients, (small, large), strict=False):
            client.publish(blocks)
            assert await client.flush(20)
        flooded = 0
        others = [chain(100 + i, 4, 500_000) for i in range(8)]

        async def flood(client: KvClient) -> None:
            nonlocal flooded
            keys = [block.header.key for block in large]
            while True:
                fetched = await client.fetch(await client.lookup(keys), namespace=NAMESPACE, deadline_s=10)
                flooded += len(fetched.blocks)
                client.publish(others[flooded % 8])
                await asyncio.sleep(0)  # a lookup of evicted blocks in process answers without waiting: the loop must get on

        floods = [asyncio.create_task(flood(client)) for client in clients[1:] for _ in range(4)]
        served = 0
        for _ in range(20):
            hits = await clients[0].lookup([block.header.key for block in small], deadline_s=2)
            served += len((await clients[0].fetch(hits, namespace=NAMESPACE, deadline_s=2)).blocks)
            await asyncio.sleep(0.02)
        for task in floods:
            task.cancel()
        await asyncio.gather(*floods, return_exceptions=True)
        for client in clients:
            await client.close()
        assert served >= 36, "the trickle was starved"
        assert flooded >= 24, "the flood was starved"
