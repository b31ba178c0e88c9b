"""Which nodes have an open door (`kvstore.door`), and the threads that go through it.

A node on this host, of this user, is read from the memory that it shares, a GPU's too where this process uses that GPU, else over the
Unix socket; another that names a door is read over TCP.
A door that cannot be opened, or that fails, is left alone for a while: its node is served by gRPC as if there were none.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from kvstore.arena import host_identity
from kvstore.block import EncodedBlock
from kvstore.clock import Clock
from kvstore.errors import ConcertinaError, CorruptBlockError
from kvstore.metadata import NodeRecord

from .buffers import Buffers
from .door import Door, open_door
from .shared import SharedMemory

log = logging.getLogger(__name__)

#: A door that failed is tried again after so long.
SHUT_S = 10.0
OPEN_TIMEOUT_S = 2.0
#: After a read that a node was not asked for, it is told so.
TELL_S = 0.005
#: Connections to one node that stay open when nobody uses them, and threads over all nodes.
KEPT_DOORS, THREADS = 4, 8
T = TypeVar("T")


class Doors:
    """Opens doors on use and keeps them.

    Parameters
    ----------
    paths : tuple of str
        Which may be taken: ``local``, ``tcp``.
    token : str
        The credential to show; empty for none.
    clock : Clock
    """

    def __init__(self, paths: tuple[str, ...], token: str, clock: Clock) -> None:
        self._paths = paths
        self._token = token
        self._clock = clock
        self._here = host_identity()
        self._idle: defaultdict[str, list[Door]] = defaultdict(list)
        self._arenas: dict[str, SharedMemory] = {}  # the memory of nodes on this host, mapped once for all doors
        self._shut_until: dict[str, float] = {}
        self._telling: set[str] = set()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="door")
        self._closed = False

    def to(self, node: NodeRecord) -> str | None:
        """The way to `node` that a call may try now: ``local``, ``tcp``, or None for gRPC."""
        if self._clock.now() < self._shut_until.get(node.incarnation, 0.0):
            return None
        if "local" in self._paths and node.host == self._here:
            return "local"
        return "tcp" if "tcp" in self._paths and node.door else None

    async def through(self, node: NodeRecord, work: Callable[[Door], T], ask: Callable[[Door], bool] = lambda door: False) -> T | None:
        """`work` with a door of `node`, in a thread; None where that did not come to its end and gRPC must go on.

        Parameters
        ----------
        ask : callable
            Does at once, in this thread, what `work` would do first, where a connection is open: the node answers while the thread wakes.
            `work` must be able to do without. Where it returns True, there is little left to do once the node has answered, and that is
            waited for and done in this thread, too.

        Raises
        ------
        CorruptBlockError
            As `work` does.
        """
        way = self.to(node)
        if way is None:
            return None
        door, little_left = self._asked(node, ask)
        try:
            if door is not None and little_left and await self._answered(door):
                return self._work(node, way, work, door)
            return await self._in_thread(node, way, work, door)
        except CorruptBlockError:
            raise
        except (ConcertinaError, OSError, ValueError) as error:
            log.info("the door of node %s is left alone for a while: %s", node.address, error)
            self._shut_until[node.incarnation] = self._clock.now() + SHUT_S
            return None

    def find(self, node: NodeRecord, keys: Sequence[bytes], tokens: int, buffers: Buffers) -> list[EncodedBlock]:
        """As `Door.find`, where a door is open; the node is told once the caller has the blocks, since both may be on one processor."""
        idle, incarnation = self._idle.get(node.incarnation), node.incarnation
        if not idle or self.to(node) != "local" or not (blocks := idle[-1].find(keys, tokens, buffers)):
            return []
        if incarnation not in self._telling:
            self._telling.add(incarnation)
            asyncio.get_running_loop().call_later(TELL_S, self._tell, incarnation)
        return blocks

    def _tell(self, incarnation: str) -> None:
        self._telling.discard(incarnation)
        for door in self._idle.get(incarnation, ()):
            door.tell()

    def keep(self, incarnations: set[str]) -> None:
        """Close what is open to any other node."""
        for gone in set(self._idle) - incarnations:
            for door in self._idle.pop(gone):
                door.close()
        for gone in set(self._arenas) - incarnations:
            del self._arenas[gone]
        self._shut_until = {i: until for i, until in self._shut_until.items() if i in incarnations}

    def close(self) -> None:
        """Close everything, after the calls that run."""
        self._closed = True
        self._threads.shutdown(wait=True)
        self.keep(set())

    def _asked(self, node: NodeRecord, ask: Callable[[Door], bool]) -> tuple[Door | None, bool]:
        """An open door that has been asked, if there is one; and what `ask` returned."""
        if not (idle := self._idle[node.incarnation]):
            return None, False
        door = idle.pop()
        try:
            return door, ask(door)
        except (ConcertinaError, OSError):
            door.close()
            return None, False

    @staticmethod
    async def _answered(door: Door) -> bool:
        try:
            return await door.readable()
        except BaseException:
            door.close()
            raise

    async def _in_thread(self, node: NodeRecord, way: str, work: Callable[[Door], T], door: Door | None) -> T:
        working = self._threads.submit(self._work, node, way, work, door)
        try:
            return await asyncio.wrap_future(working)
        except asyncio.CancelledError:
            if working.cancel() and door is not None:  # no thread has it, nor ever will
                door.close()
            raise

    def _work(self, node: NodeRecord, way: str, work: Callable[[Door], T], door: Door | None) -> T:
        idle = self._idle[node.incarnation]
        if door is None:
            door = open_door(node, way == "local", self._token, OPEN_TIMEOUT_S)
            if door.arena is not None:
                door.arena = self._arenas.setdefault(node.incarnation, door.arena)
        try:
            outcome = work(door)
        except BaseException:
            door.close()
            raise
        if door.open and len(idle) < KEPT_DOORS and not self._closed:
            idle.append(door)
        else:
            door.close()
        return outcome
