"""Who may hold live KV: a bounded number of requests, as many as there are free pages for, first come first served."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from enum import Enum


class Take(Enum):
    """What came of a request's attempt to take its pages."""

    TAKEN = "taken"
    #: It waits for another request's blocks; those behind it may go first.
    LATER = "later"
    #: There are too few pages; those behind it wait with it, or it might wait for ever.
    NO_ROOM = "no room"


@dataclass(order=True, slots=True)
class _Waiting:
    order: int
    take: Callable[[], Take] = field(compare=False)
    turn: asyncio.Future[None] = field(compare=False)


class Admission:
    """A line of requests in order of arrival, and `requests` places. One event loop uses it."""

    def __init__(self, requests: int) -> None:
        self.free_requests = requests
        self._line: list[_Waiting] = []

    @property
    def waiting(self) -> int:
        return len(self._line)

    @contextlib.asynccontextmanager
    async def room(self, order: int, take: Callable[[], Take], undo: Callable[[], None]) -> AsyncIterator[None]:
        """Hold a place while inside, entered once `take` has taken.

        Parameters
        ----------
        order : int
            Number of arrival. Who comes back keeps it, and so goes before all that came later.
        take : callable
            Tries to take what the request needs; called again after every `poke` and every departure.
        undo : callable
            Gives it back; called when the request is cancelled in the moment of its turn.
        """
        entry = _Waiting(order, take, asyncio.get_running_loop().create_future())
        bisect.insort(self._line, entry)
        self.poke()
        try:
            await entry.turn
        except asyncio.CancelledError:
            if entry.turn.done() and not entry.turn.cancelled():
                undo()
                self._leave()
            else:
                self._line.remove(entry)
                self.poke()
            raise
        try:
            yield
        finally:
            self._leave()

    def poke(self) -> None:
        """Something has changed: let in who can come in."""
        for entry in list(self._line):
            if not self.free_requests:
                return
            if entry.turn.done():
                continue
            outcome = entry.take()
            if outcome is Take.NO_ROOM:
                return
            if outcome is Take.TAKEN:
                self._line.remove(entry)
                self.free_requests -= 1
                entry.turn.set_result(None)

    def _leave(self) -> None:
        self.free_requests += 1
        self.poke()
