"""S3-FIFO (Yang et al., SOSP'23): a small queue for newcomers, a main queue, and ghosts of those that left the small one unused.

Deviation: only leaves may go. A block whose turn comes while it has children or is held is *parked*, and goes to the front of the
main queue as soon as it may leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .base import BlockId, BlockInfo, EvictionPolicy, Request, Victim
from .ghosts import Ghosts
from .queues import SlotQueues
from .table import BlockTable

_SMALL, _MAIN, _PARKED = range(3)


class S3FifoPolicy(EvictionPolicy):
    """Newcomers that are not used again leave soon; what was used, or comes back as a ghost, goes round the main queue."""

    name: ClassVar[str] = "s3fifo"

    @dataclass(frozen=True, slots=True)
    class Config:
        """
        Parameters
        ----------
        small_share : float
            Share of the blocks that the small queue keeps.
        ghosts_per_block : float
            Ghosts for each resident block.
        """

        small_share: float = 0.1
        ghosts_per_block: float = 1.0

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(config)
        self.table = BlockTable()
        self._queues = SlotQueues(3)
        self._queue = bytearray()
        self._uses = bytearray()
        self._ghosts = Ghosts(self.config.ghosts_per_block)

    def access(self, request: Request, blocks: Sequence[BlockInfo]) -> None:
        fresh = []
        for block in blocks:
            slot = self.table.find(block.id)
            if slot < 0:
                fresh.append(block)
            else:
                self._uses[slot] = min(3, self._uses[slot] + 1)
        slots = [self.table.add(block) for block in fresh]
        self._queues.reserve(self.table.slots)
        for column in (self._queue, self._uses):
            column.extend(bytes(self.table.slots - len(column)))
        for block, slot in zip(reversed(fresh), reversed(slots), strict=True):  # the tail of a chain leaves before its head
            self._uses[slot] = 0
            self._enqueue(_SMALL if self._ghosts.take(block.id) is None else _MAIN, slot)

    def victim(self, now: float) -> Victim | None:
        queues, uses = self._queues, self._uses
        while queues.length[_SMALL] or queues.length[_MAIN]:
            small = queues.length[_SMALL] > self.config.small_share * len(self.table) or not queues.length[_MAIN]
            queue = _SMALL if small else _MAIN
            slot = queues.head[queue]
            if uses[slot]:
                uses[slot] = 0 if small else uses[slot] - 1
                self._move(_MAIN, slot)
            elif self.table.children[slot] or self.table.is_held(slot):
                self._move(_PARKED, slot)
            else:
                return Victim(self.table.ids[slot])
        return None

    def removed(self, id: BlockId) -> None:
        slot = self.table.find(id)
        if slot < 0:
            return
        if self._queue[slot] == _SMALL:
            self._ghosts.remember(id, 0, 0.0, len(self.table))
        self._queues.remove(self._queue[slot], slot)
        parent = self.table.remove(slot)
        if parent >= 0:
            self._unpark(parent)

    def demoted(self, id: BlockId, rung: int) -> None:
        slot = self.table.find(id)
        if slot >= 0:
            self.table.move(slot, rung)

    def promoted(self, id: BlockId) -> None:
        self.demoted(id, 0)

    def hold(self, id: BlockId) -> None:
        self.table.hold(id)

    def release(self, id: BlockId) -> None:
        if self.table.release(id):
            slot = self.table.find(id)
            if slot >= 0 and not self.table.children[slot]:
                self._unpark(slot)

    def _enqueue(self, queue: int, slot: int) -> None:
        self._queue[slot] = queue
        self._queues.append(queue, slot)

    def _move(self, queue: int, slot: int) -> None:
        self._queues.remove(self._queue[slot], slot)
        self._enqueue(queue, slot)

    def _unpark(self, slot: int) -> None:
        if self._queue[slot] == _PARKED:
            self._queues.remove(_PARKED, slot)
            self._queue[slot] = _MAIN
            self._queues.prepend(_MAIN, slot)
