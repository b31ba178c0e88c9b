"""Faults of store nodes: killed, stopped, restarted, starved, lied about, and with damaged memory."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import socket
from pathlib import Path

from kvstore.errors import ConcertinaError
from kvstore.metadata import IndexEntry, NodeRecord, connect

from .base import Fault
from .blocks import chain
from .load import listed
from .system import System

VICTIM = "node-0"


class Kill(Fault):
    """SIGKILL in the middle of what `load` does; another process takes the node's place with a new incarnation.

    Parameters
    ----------
    load : str
    same_address : bool
        Whether it comes back on the same port.
    way : str
    """

    damages = True

    def __init__(self, load: str, same_address: bool = False, way: str = "grpc") -> None:
        self.load, self.way = load, way
        self.lasts_s = 0.1
        self._same_address = same_address
        self._address = "127.0.0.1:0"

    async def inject(self, system: System) -> None:
        node = await system.kill_node(VICTIM)
        if self._same_address:
            self._address = node.address

    async def heal(self, system: System) -> None:
        await system.start_node(VICTIM, self._address)


class Inherit(Kill):
    """Another node gets the dead one's address at once, while the dead one is still believed alive."""

    lasts_s = 0.0

    def __init__(self) -> None:
        super().__init__("mixed", same_address=True)

    async def heal(self, system: System) -> None:
        """The heir stays under its own name until the next repetition kills it."""
        heir = await system.start_node("heir", self._address)
        system.nodes[VICTIM] = system.nodes.pop("heir")
        assert heir.address == self._address


class Drain(Fault):
    """SIGTERM: the node finishes what runs and leaves; another takes its place."""

    damages = True
    lasts_s = 0.0

    async def inject(self, system: System) -> None:
        node = system.nodes.pop(VICTIM)
        node.signal(signal.SIGTERM)
        await asyncio.wait_for(node.process.wait(), 15)
        await node.stop_proxies()

    async def heal(self, system: System) -> None:
        await system.start_node(VICTIM)


class Stop(Fault):
    """SIGSTOP in the middle of what `load` does, then SIGCONT."""

    def __init__(self, load: str, lasts_s: float = 0.9, way: str = "grpc") -> None:
        self.load, self.way = load, way
        self.lasts_s = lasts_s

    async def inject(self, system: System) -> None:
        system.nodes[VICTIM].signal(signal.SIGSTOP)

    async def heal(self, system: System) -> None:
        system.nodes[VICTIM].signal(signal.SIGCONT)


class Stutter(Fault):
    """The node is stopped and goes on, ten times in a row."""

    async def inject(self, system: System) -> None:
        for _ in range(10):
            system.nodes[VICTIM].signal(signal.SIGSTOP)
            await asyncio.sleep(0.03)
            system.nodes[VICTIM].signal(signal.SIGCONT)
            await asyncio.sleep(0.01)


class SameAddress(Fault):
    """A second node is started on an address that is taken: it must say so and end."""

    async def inject(self, system: System) -> None:
        twin = await system.spawn("services.cli", "twin", system.nodes[VICTIM].address)
        if not await asyncio.wait_for(twin.wait(), 30):
            raise ConcertinaError("a second node took an address that was taken")


class Impostor(Fault):
    """Redis names a node that does not exist, under the address of one that does, as holder of blocks which are elsewhere."""

    async def inject(self, system: System) -> None:
        self._metadata = connect(system.redis_url)
        self._record = NodeRecord("impostor", f"{random.getrandbits(64):016x}", system.nodes[VICTIM].address, arena_bytes=1 << 40)
        await self._metadata.heartbeat(self._record, 5.0)
        entries = [IndexEntry(block.header.key, 1000, 3) for block in chain(max(1, system.fresh() - 2), 12)]
        await self._metadata.announce(self._record.incarnation, entries)

    async def heal(self, system: System) -> None:
        await self._metadata.leave(self._record)
        await self._metadata.close()


class NoFiles(Fault):
    """The node has no file descriptor left: it cannot accept a connection, nor open one."""

    async def inject(self, system: System) -> None:
        pid = system.nodes[VICTIM].pid
        self._limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        used = len(os.listdir(f"/proc/{pid}/fd"))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used, self._limits[1]))
        system.nodes[VICTIM].proxy.cut()
        system.redis_proxy.cut()

    async def heal(self, system: System) -> None:
        resource.prlimit(system.nodes[VICTIM].pid, resource.RLIMIT_NOFILE, self._limits)


class Crowd(Fault):
    """Two hundred connections that say nothing."""

    async def inject(self, system: System) -> None:
        host, _, port = system.nodes[VICTIM].address.rpartition(":")
        self._sockets = [socket.create_connection((host, int(port)), 5) for _ in range(200)]

    async def heal(self, system: System) -> None:
        for one in self._sockets:
            one.close()


class FlipArena(Fault):
    """Bits change in the memory of all nodes, under the readers."""

    load = "get"
    damages = True

    def __init__(self, way: str = "grpc") -> None:
        self.way = way

    async def inject(self, system: System) -> None:
        for node in system.nodes.values():
            await asyncio.to_thread(_flip, node.pid, 200)


class FullOfPins(Fault):
    """As much as may be is pinned, and still blocks keep coming."""

    load = "pressure"
    lasts_s = 0.6

    async def inject(self, system: System) -> None:
        self._keys: list[bytes] = []
        for record in system.client.nodes():
            keys = [block.key for block in await listed(system, record) if not block.pinned]
            statuses = await system.client.admin.pin(keys, 60)
            self._keys += [key for key, status in zip(keys, statuses, strict=True) if status == "OK"]

    async def heal(self, system: System) -> None:
        await system.client.admin.unpin(self._keys)


class Full(Fault):
    """Far more is written than fits: nodes demote and evict all the time, under readers."""

    load = "pressure"
    lasts_s = 0.8

    def __init__(self, way: str = "grpc") -> None:
        self.way = way

    async def inject(self, system: System) -> None:
        """The load does it."""


class ClearAll(Fault):
    """All blocks are dropped by an administrator in the middle of reads."""

    load = "get"

    async def inject(self, system: System) -> None:
        await system.client.admin.clear()


class JumpingClock(Fault):
    """The node's clocks jump: an hour forward, and eleven days back."""

    damages = True
    lasts_s = 0.4

    async def inject(self, system: System) -> None:
        await system.kill_node(VICTIM)
        node = await system.start_node(VICTIM, module="tests.fault.jumping_node")
        await asyncio.sleep(0.3)
        node.signal(signal.SIGUSR1)
        node.signal(signal.SIGUSR2)


def _flip(pid: int, bits: int) -> None:
    """Change `bits` random bits of a node's arena from outside."""
    arena = next(fd for fd in Path(f"/proc/{pid}/fd").iterdir() if "concertina-arena" in os.readlink(fd))
    with arena.open("r+b", buffering=0) as memory:
        size = memory.seek(0, os.SEEK_END)
        for _ in range(bits):
            at = random.randrange(size)
            byte = os.pread(memory.fileno(), 1, at)[0]
            os.pwrite(memory.fileno(), bytes([byte ^ 1 << random.randrange(8)]), at)
