"""Removes what dead nodes left in the index.

A node that drains withdraws its own entries; one that was killed cannot. Readers ignore such entries and tidy away those they meet,
but nobody meets the entries of prompts that never come again, and Redis would fill up with them over the years. So one node of the
cluster, the one with the smallest incarnation, walks the whole index all the time, a little at a time.
"""

from __future__ import annotations

import asyncio
import logging

from kvstore.clock import Clock
from kvstore.errors import ConcertinaError

from .base import Metadata

log = logging.getLogger(__name__)

#: Blocks in one step: milliseconds of Redis's time.
STEP_BLOCKS = 8192
#: Pause between two steps: a walk over 10 million blocks takes twenty minutes, and costs Redis next to nothing.
STEP_S = 1.0
#: Dead incarnations remembered; with more, the oldest is met anew.
MAX_MISSING = 10_000
#: An incarnation must have been missing for so long before its entries go.
GRACE_S = 30.0


class Reconciler:
    """The walk of one node.

    Parameters
    ----------
    metadata : Metadata
    incarnation : str
        This node's own; it walks while none of the living has a smaller one.
    clock : Clock
    """

    def __init__(
        self, metadata: Metadata, incarnation: str, clock: Clock, step_blocks: int = STEP_BLOCKS, step_s: float = STEP_S
    ) -> None:
        self.removed = 0
        self._metadata = metadata
        self._incarnation = incarnation
        self._clock = clock
        self._step_blocks = step_blocks
        self._step_s = step_s
        self._cursor = 0
        self._missing: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._walk())

    async def stop(self) -> None:
        """End the walk. Safe to call twice."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def step(self) -> bool:
        """Look at the next part of the index. Returns False when it is another node's task.

        Raises
        ------
        TransportError, DeadlineError
            When the metadata is away.
        """
        living = {record.incarnation for record in await self._metadata.nodes()}
        if self._incarnation not in living or self._incarnation != min(living):
            return False
        entries, self._cursor = await self._metadata.scan(self._cursor, self._step_blocks)
        now = self._clock.now()
        dead: dict[str, list[bytes]] = {}
        for key, places in entries:
            for place in places:
                if place.incarnation not in living and now - self._missing.setdefault(place.incarnation, now) >= GRACE_S:
                    dead.setdefault(place.incarnation, []).append(key)
        still_missing = [(incarnation, since) for incarnation, since in self._missing.items() if incarnation not in living]
        self._missing = dict(still_missing[-MAX_MISSING:])
        for incarnation, keys in dead.items():
            await self._metadata.withdraw(incarnation, keys)
            self.removed += len(keys)
        return True

    async def _walk(self) -> None:
        while True:
            await asyncio.sleep(self._step_s)
            try:
                await self.step()
            except ConcertinaError as error:
                log.debug("the walk over the index pauses: %s", error)
