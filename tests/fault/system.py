"""A real cluster for faults: Valkey behind a proxy, node processes each behind a proxy, and a client that judges all it is given."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from kvstore.client import ClientConfig, GrpcTransport, KvClient
from kvstore.client.door import Door, open_door
from kvstore.metadata import NodeRecord, connect
from kvstore.metadata.embedded import EmbeddedValkey, start_valkey
from kvstore.settings import environment
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from .proxy import TcpProxy

ROOT = Path(__file__).parents[2]
ARENA_BYTES = 12 << 20
#: Short, so that a repetition does not take long; what they bound is the same.
NODE_SETTINGS = {"HEARTBEAT_S": "0.25", "GET_HOLD_S": "1", "PUT_TIMEOUT_S": "3", "GET_TIMEOUT_S": "3", "DRAIN_S": "1", "MAX_STREAMS": "256"}
CLIENT = {"refresh_s": 0.2, "suspect_s": 0.3, "redis_timeout_s": 0.3, "put_timeout_s": 1.5, "rpc_timeout_s": 1.5}
HEALTHY_WITHIN_S = 20.0


class ProxiedTransport:
    """gRPC to each node through that node's proxy."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._grpc = GrpcTransport()

    def get(self, address: str, request: pb.GetRequest, timeout_s: float) -> AsyncIterator[bytes]:
        return self._grpc.get(self._system.way_to(address), request, timeout_s)

    async def put(self, address: str, messages: Iterable[bytes], timeout_s: float) -> pb.PutResponse:
        return await self._grpc.put(self._system.way_to(address), messages, timeout_s)

    async def call(self, address: str, rpc: str, request: Any, timeout_s: float) -> Any:
        return await self._grpc.call(self._system.way_to(address), rpc, request, timeout_s)

    async def keep(self, addresses: set[str]) -> None:
        await self._grpc.keep({self._system.way_to(address) for address in addresses})

    async def close(self) -> None:
        await self._grpc.close()


@dataclass(slots=True)
class NodeProcess:
    """A node's process and how it said it can be reached."""

    process: asyncio.subprocess.Process
    address: str
    incarnation: str
    proxy: TcpProxy
    door: TcpProxy

    @property
    def pid(self) -> int:
        return self.process.pid

    async def stop_proxies(self) -> None:
        """Nobody reaches it any more."""
        await self.proxy.stop()
        await self.door.stop()

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(number)


class System:
    """See the module. `start` before use, `stop` after; `nodes` are the processes by name.

    Parameters
    ----------
    directory : path
    spill : bool
        Whether the nodes spill to directories of their own.
    nodes : int

    `way` says which of the clients is in use, see `Fault.way`; `node_options` are given to every node.
    """

    def __init__(self, directory: Path, spill: bool = False, nodes: int = 2) -> None:
        self.directory = directory
        self.nodes: dict[str, NodeProcess] = {}
        self.way = "grpc"
        self.clients: dict[str, KvClient] = {}
        self.spill = spill
        self.node_options: tuple[str, ...] = ()
        self.redis: EmbeddedValkey
        self.redis_proxy: TcpProxy
        self._count = nodes
        self._numbers = itertools.count()
        self._names = itertools.count(1)

    @property
    def client(self) -> KvClient:
        return self.clients[self.way]

    @property
    def redis_url(self) -> str:
        return f"redis://127.0.0.1:{self.redis_proxy.port}/0"

    def fresh(self) -> int:
        """A name for a chain that nobody has written yet."""
        return next(self._names)

    def way_to(self, address: str) -> str:
        """The proxy in front of a node."""
        port = next((node.proxy.port for node in self.nodes.values() if node.address == address), None)
        return f"127.0.0.1:{port}" if port else address

    async def start(self) -> None:
        self.redis = self.new_valkey()
        self.redis_proxy = TcpProxy("127.0.0.1", self.redis.port)
        await self.redis_proxy.start()
        for i in range(self._count):
            await self.start_node(f"node-{i}")
        self._patches = [patch("kvstore.client.doors.open_door", self.open_door), patch("kvstore.client.doors.SHUT_S", 0.2)]
        for one in self._patches:
            one.start()
        config = ClientConfig(redis_url=self.redis_url, **CLIENT)
        self.clients["grpc"] = KvClient(config, transport=ProxiedTransport(self))
        for way in ("tcp", "local"):
            self.clients[way] = KvClient(replace(config, paths=way))
        for client in self.clients.values():
            await client.start()

    async def stop(self) -> None:
        for client in self.clients.values():
            await client.close()
        for one in self._patches:
            one.stop()
        for name in list(self.nodes):
            await self.kill_node(name)
        await self.redis_proxy.stop()
        self.redis.stop()

    def new_valkey(self, port: int = 0) -> EmbeddedValkey:
        """One more server, empty."""
        return start_valkey(self.directory / f"valkey-{next(self._numbers)}", port, settings={"repl-diskless-sync-delay": "0"})

    async def start_node(self, name: str, listen: str = "127.0.0.1:0", *options: str, module: str = "services.cli") -> NodeProcess:
        """A node's process; returns when it is ready."""
        process = await self.spawn(module, name, listen, *options)
        line = await asyncio.wait_for(process.stdout.readline(), 60)
        ready = json.loads(line)
        proxy, door = TcpProxy(*_split(ready["address"])), TcpProxy("127.0.0.1", await self._door_port(ready["incarnation"]))
        await proxy.start()
        await door.start()
        self.nodes[name] = NodeProcess(process, ready["address"], ready["incarnation"], proxy, door)
        return self.nodes[name]

    async def _door_port(self, incarnation: str) -> int:
        """Where a node that has just joined says its door is; 9, where nobody listens, if Redis does not know."""
        metadata = connect(self.redis_url)
        records = {record.incarnation: record for record in await metadata.nodes()}
        await metadata.close()
        return _split(records[incarnation].door)[1] if incarnation in records else 9

    def open_door(self, node: NodeRecord, here: bool, token: str, timeout_s: float) -> Door:
        """A door of a node through that node's proxy, unless it is on shared memory."""
        proxies = {own.incarnation: own.door.port for own in self.nodes.values()}
        return open_door(replace(node, door=f"127.0.0.1:{proxies.get(node.incarnation, 9)}"), here, token, timeout_s)

    async def spawn(self, module: str, name: str, listen: str, *options: str) -> asyncio.subprocess.Process:
        """``concertina node`` (or another module that takes its arguments) as a child."""
        command = [sys.executable, "-m", module, "node", "--redis", self.redis_url, "--listen", listen]
        command += ["--arena", str(ARENA_BYTES), "--id", name, *self.node_options, *options]
        if self.spill:
            command += ["--spill", str(self.spill_of(name)), "--spill-bytes", "64MiB"]
        settings = {f"CONCERTINA_NODE__{key}": value for key, value in NODE_SETTINGS.items()}
        with (self.directory / f"{name}.log").open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *command, stdout=asyncio.subprocess.PIPE, stderr=log, env=environment(**settings), cwd=ROOT
            )

    def spill_of(self, name: str) -> Path:
        """Where the node of this name spills to."""
        return self.directory / f"spill-{name}"

    async def kill_node(self, name: str) -> NodeProcess:
        """SIGKILL, and wait until it is gone."""
        node = self.nodes.pop(name)
        node.signal(signal.SIGKILL)
        await node.process.wait()
        await node.stop_proxies()
        return node

    def living(self) -> list[NodeRecord]:
        """The nodes whose processes run, as the client knows them; it lists one that was killed for a while longer."""
        here = {node.incarnation for node in self.nodes.values()}
        return [record for record in self.client.nodes() if record.incarnation in here]

    async def account(self, record: NodeRecord) -> pb.StatsResponse:
        """A node's account of its memory."""
        return await self.client.admin.stats(record)

    async def wait_until_members(self, deadline: float) -> None:
        """Until the client knows all nodes that live. Raises TimeoutError after `deadline` (monotonic seconds)."""
        wanted = {node.incarnation for node in self.nodes.values()}
        while not self.client.available or not wanted <= {record.incarnation for record in self.client.nodes()}:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the members are {self.client.nodes()}, not {wanted}")
            await asyncio.sleep(0.02)

    async def stream(self, record: NodeRecord, keys: list[bytes], timeout_s: float) -> AsyncIterator[bytes]:
        """The messages of a raw Get."""
        async with aclosing(ProxiedTransport(self).get(record.address, pb.GetRequest(keys=keys), timeout_s)) as messages:
            async for message in messages:
                yield message


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)
