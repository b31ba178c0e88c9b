"""Who may hold live KV: a bounded number of requests and of blocks, first come first served."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator


class Admission:
    """Room for `requests` requests that hold `blocks` blocks of live KV together. One event loop uses it.

    A request takes at once all that it can come to need, so one that runs is never short of room. A large one at the head
    of the line is waited for: small ones behind it do not overtake, or it might wait for ever.
    """

    def __init__(self, requests: int, blocks: int) -> None:
        self.total_requests, self.total_blocks = requests, blocks
        self.free_requests, self.free_blocks = requests, blocks
        self._line: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._line)

    @contextlib.asynccontextmanager
    async def room(self, blocks: int) -> AsyncIterator[None]:
        """Hold one request's room while inside; `blocks` is at most `total_blocks`."""
        await self._enter(blocks)
        try:
            yield
        finally:
            self._leave(blocks)

    async def _enter(self, blocks: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append((blocks, turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave(blocks)  # its turn came in the same moment
            else:
                self._line = deque(entry for entry in self._line if entry[1] is not turn)
                self._admit()
            raise

    def _leave(self, blocks: int) -> None:
        self.free_requests += 1
        self.free_blocks += blocks
        self._admit()

    def _admit(self) -> None:
        while self._line and self.free_requests and self._line[0][0] <= self.free_blocks:
            blocks, turn = self._line.popleft()
            if not turn.done():
                self.free_requests -= 1
                self.free_blocks -= blocks
                turn.set_result(None)
