"""Policies that rank blocks by one rising number: lru, fifo, gdsf and opt differ only in it.

The number ("rank") of a block is an int; the lowest leaf goes first, and of equal ones the deepest. A heap a rung of the fidelity
ladder holds the candidates; entries are single ints ``rank | inverted depth | slot`` and are cleaned when they come to the top.
"""

from __future__ import annotations

import heapq
from abc import abstractmethod
from array import array
from collections.abc import Sequence

import numpy as np

from .base import BlockId, BlockInfo, EvictionPolicy, Request, Victim
from .table import BlockTable

_SLOT_BITS, _DEPTH_BITS = 32, 24
_SLOT_MASK, _DEPTH_MASK = (1 << _SLOT_BITS) - 1, (1 << _DEPTH_BITS) - 1


class RankedPolicy(EvictionPolicy):
    """Leaves go in the order of `rank`; on a ladder, the step that loses least per byte for the reuse that `reuse` expects."""

    def __init__(self, config: EvictionPolicy.Config | None = None) -> None:
        super().__init__(config)
        self.table = BlockTable()
        self.ranks = array("q")
        self.used = array("d")
        self._heaps: list[list[int]] = [[]]

    @abstractmethod
    def rank(self, request: Request, slot: int, fresh: bool) -> int:
        """The new rank of a block that `request` uses, or inserts if `fresh`."""

    def reuse(self, slot: int, now: float) -> float:
        """Expected uses a second: without learning, one in the time since the last."""
        return 1.0 / (max(now - self.used[slot], 0.0) + 1.0)

    def access(self, request: Request, blocks: Sequence[BlockInfo]) -> None:
        table, ranks, used, now = self.table, self.ranks, self.used, request.now
        for block in reversed(blocks):  # children first, so that what has one is not taken for a leaf
            slot = table.find(block.id)
            fresh = slot < 0
            if fresh:
                slot = table.add(block)
                while len(ranks) < table.slots:
                    ranks.append(0)
                    used.append(0.0)
            rank = self.rank(request, slot, fresh)
            moved = fresh or rank != ranks[slot]
            ranks[slot] = rank
            used[slot] = now
            if moved and (not table.children[slot] or table.step(slot).rung is not None):
                self._push(slot)

    def victim(self, now: float) -> Victim | None:
        best: tuple[float, int] | None = None
        for rung in range(len(self._heaps)):
            slot = self._top(rung)
            if slot >= 0:
                value = self.table.step(slot).loss * self.reuse(slot, now)
                if best is None or value < best[0]:
                    best = (value, slot)
        if best is None:
            return None
        value, slot = best
        return Victim(self.table.ids[slot], self.table.step(slot).rung, value)

    def census(self, now: float) -> tuple[np.ndarray, np.ndarray]:
        slots = self.table.resident_slots()
        age_s = np.maximum(now - np.array(self.used)[slots], 0.0)
        return self.table.census(1.0 / (age_s + 1.0), slots)

    def removed(self, id: BlockId) -> None:
        slot = self.table.find(id)
        if slot >= 0:
            self.left(slot)
            parent = self.table.remove(slot)
            if parent >= 0:
                self._push(parent)

    def left(self, slot: int) -> None:
        """Called before the block in `slot` leaves."""

    def demoted(self, id: BlockId, rung: int) -> None:
        self._stand(id, rung)

    def promoted(self, id: BlockId) -> None:
        self._stand(id, 0)

    def hold(self, id: BlockId) -> None:
        self.table.hold(id)

    def release(self, id: BlockId) -> None:
        if self.table.release(id):
            slot = self.table.find(id)
            if slot >= 0:
                self._push(slot)

    def _stand(self, id: BlockId, rung: int) -> None:
        slot = self.table.find(id)
        if slot >= 0:
            self.table.move(slot, rung)
            self._push(slot)

    def _push(self, slot: int) -> None:
        rung = self.table.rung[slot]
        while len(self._heaps) <= rung:
            self._heaps.append([])
        heap = self._heaps[rung]
        heapq.heappush(heap, self._entry(slot))
        if len(heap) > 64 + 3 * len(self.table):
            heap[:] = sorted(self._entry(s) for s in range(self.table.slots) if self._is_candidate(s, rung))

    def _entry(self, slot: int) -> int:
        depth = _DEPTH_MASK - min(self.table.depth[slot], _DEPTH_MASK)
        return (self.ranks[slot] << _DEPTH_BITS | depth) << _SLOT_BITS | slot

    def _is_candidate(self, slot: int, rung: int) -> bool:
        table = self.table
        if not table.is_resident(slot) or table.rung[slot] != rung or table.is_held(slot):
            return False
        return not table.children[slot] or table.step(slot).rung is not None

    def _top(self, rung: int) -> int:
        """Slot of the lowest candidate at `rung`, -1 if there is none; outdated entries above it are thrown away."""
        heap = self._heaps[rung]
        while heap:
            slot = heap[0] & _SLOT_MASK
            if self._is_candidate(slot, rung) and heap[0] == self._entry(slot):
                return slot
            heapq.heappop(heap)
        return -1
