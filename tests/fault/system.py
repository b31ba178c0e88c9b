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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore.client import ClientConfig, GrpcTransport, KvClient
from kvstore.metadata import NodeRecord
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

    @property
    def pid(self) -> int:
        return self.process.pid

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(number)


class System:
    """See the module. `start` before use, `stop` after; `nodes` are the processes by name."""

    def __init__(self, directory: Path, nodes: int = 2) -> None:
        self.directory = directory
        self.nodes: dict[str, NodeProcess] = {}
        self.client: KvClient
        self.redis: EmbeddedValkey
        self.redis_proxy: TcpProxy
        self._count = nodes
        self._numbers = itertools.count()
        self._names = itertools.count(1)

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
        self.client = KvClient(ClientConfig(redis_url=self.redis_url, **CLIENT), transport=ProxiedTransport(self))
        await self.client.start()

    async def stop(self) -> None:
        await self.client.close()
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
        proxy = TcpProxy(*_split(ready["address"]))
        await proxy.start()
        self.nodes[name] = NodeProcess(process, ready["address"], ready["incarnation"], proxy)
        return self.nodes[name]

    async def spawn(self, module: str, name: str, listen: str, *options: str) -> asyncio.subprocess.Process:
        """``concertina node`` (or another module that takes its arguments) as a child."""
        command = [sys.executable, "-m", module, "node", "--redis", self.redis_url, "--listen", listen]
        command += ["--arena", str(ARENA_BYTES), "--id", name, *options]
        settings = {f"CONCERTINA_NODE__{key}": value for key, value in NODE_SETTINGS.items()}
        with (self.directory / f"{name}.log").open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *command, stdout=asyncio.subprocess.PIPE, stderr=log, env=environment(**settings), cwd=ROOT
            )

    async def kill_node(self, name: str) -> NodeProcess:
        """SIGKILL, and wait until it is gone."""
        node = self.nodes.pop(name)
        node.signal(signal.SIGKILL)
        await node.process.wait()
        await node.proxy.stop()
        return node

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
