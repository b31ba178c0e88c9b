"""Faults between clients and a node, and of clients: broken, slow and lying wires, readers that stop, writers that die or lie."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import time
from contextlib import suppress

from kvstore.client.assemble import BlockReader
from kvstore.client.frames import put_messages
from kvstore.errors import ConcertinaError
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from .base import Fault
from .blocks import chain, is_one_of
from .hostile import NO_TEXT
from .proxy import Rule, TcpProxy
from .system import ROOT, ProxiedTransport, System

VICTIM = "node-0"


def _proxy(system: System, way: str) -> TcpProxy:
    """What stands between clients and the victim on this way."""
    node = system.nodes[VICTIM]
    return node.door if way == "tcp" else node.proxy


class Between(Fault):
    """What passes between clients and one node is spoiled.

    Parameters
    ----------
    rule : Rule
        As of `proxy`.
    load, way : str
    """

    def __init__(self, rule: Rule, load: str = "mixed", way: str = "grpc") -> None:
        self._rule = rule
        self.load, self.way = load, way
        self.lasts_s = 0.6

    async def inject(self, system: System) -> None:
        _proxy(system, self.way).rule = self._rule

    async def heal(self, system: System) -> None:
        _proxy(system, self.way).heal()


class Cut(Fault):
    """Connections to a node break in the middle of what `load` does, again and again."""

    def __init__(self, load: str, way: str = "grpc") -> None:
        self.load, self.way = load, way
        self.lasts_s = 0.1

    async def inject(self, system: System) -> None:
        for _ in range(5):
            _proxy(system, self.way).cut()
            await asyncio.sleep(0.06)

    async def heal(self, system: System) -> None:
        _proxy(system, self.way).heal()


class BadPath(Fault):
    """A caller's path is no text: gRPC ends its server for it, and another must take its place."""

    async def inject(self, system: System) -> None:
        host, _, port = system.nodes[VICTIM].address.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(NO_TEXT)
        await asyncio.sleep(0.02)
        writer.transport.abort()


class SlowReader(Fault):
    """A reader takes a stream so slowly that its lease ends and its pages are written anew under it."""

    load = "pressure"
    lasts_s = 0.0

    async def inject(self, system: System) -> None:
        record = system.living()[0]
        blocks = chain(system.fresh(), 24, 200_000)
        known = {block.header.key: block for block in blocks}
        with suppress(ConcertinaError):
            await ProxiedTransport(system).put(record.address, put_messages((block, 0) for block in blocks), 2.0)
        reader = BlockReader(system.stream(record, list(known), 3.0), 8 << 20)
        with suppress(ConcertinaError):
            for number in range(len(blocks)):
                if number == 1:
                    await asyncio.sleep(1.3)
                block = await reader.read(number, lambda header: True)
                if block is not None and not is_one_of(block, known):
                    raise RuntimeError("a slow reader was given bytes that nobody wrote")


class CorruptPut(Fault):
    """Blocks are put whose bytes do not certify themselves: none may be kept."""

    async def inject(self, system: System) -> None:
        record = system.living()[0]
        blocks = chain(system.fresh(), 4)
        messages = []
        for message in put_messages((block, 0) for block in blocks):
            damaged = bytearray(message)
            damaged[len(damaged) * 2 // 3] ^= 16
            messages.append(bytes(damaged))
        transport = ProxiedTransport(system)
        statuses: list[int] = []
        with suppress(ConcertinaError):
            statuses = list((await transport.put(record.address, messages, 2.0)).statuses)
        found = await transport.call(record.address, "Lookup", pb.LookupRequest(keys=[b.header.key for b in blocks]), 2.0)
        kept = [block for block in found.blocks if block.status == pb.BLOCK_STATUS_OK]
        if len(kept) > statuses.count(pb.BLOCK_STATUS_OK) or len(kept) == len(blocks):
            raise RuntimeError("a node kept a block that does not certify itself")


class Client(Fault):
    """A worker-like process of its own dies, or stands still, in the middle of what it does.

    Parameters
    ----------
    does : str
        ``put``, ``get`` or ``pressure``.
    signal : int
    """

    def __init__(self, does: str, number: int) -> None:
        self.lasts_s = 0.2
        self._does = does
        self._number = number

    async def inject(self, system: System) -> None:
        command = [sys.executable, "-m", "tests.fault.client_process", system.redis_url, self._does, str(time.monotonic_ns() // 1000)]
        self._process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, cwd=ROOT)
        await asyncio.wait_for(self._process.stdout.readline(), 30)
        await asyncio.sleep(random.uniform(0.05, 0.2))
        self._process.send_signal(self._number)

    async def heal(self, system: System) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        await self._process.wait()
