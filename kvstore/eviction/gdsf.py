"""GreedyDual-Size-Frequency (Cherkasova, HPL-98-69): frequency x cost / size, above an inflation that the evicted leave behind.

The cost of recomputing a block grows with its tokens as its size does, so cost / size is the same for all blocks here.
"""

from __future__ import annotations

from array import array
from typing import ClassVar

from .base import BlockId, EvictionPolicy, Request, Victim
from .ranked import RankedPolicy


class GdsfPolicy(RankedPolicy):
    """Rank = inflation at the last use + uses while resident; the inflation is the highest rank evicted so far."""

    name: ClassVar[str] = "gdsf"

    def __init__(self, config: EvictionPolicy.Config | None = None) -> None:
        super().__init__(config)
        self._uses = array("i")
        self._inflation = 0
        self._named: BlockId | None = None

    def rank(self, request: Request, slot: int, fresh: bool) -> int:
        if slot >= len(self._uses):
            self._uses.extend([0] * (self.table.slots - len(self._uses)))
        self._uses[slot] = 1 if fresh else self._uses[slot] + 1
        return self._inflation + self._uses[slot]

    def reuse(self, slot: int, now: float) -> float:
        return self._uses[slot] * super().reuse(slot, now)

    def victim(self, now: float) -> Victim | None:
        found = super().victim(now)
        self._named = None if found is None else found.id
        return found

    def left(self, slot: int) -> None:
        if self.table.ids[slot] == self._named:
            self._inflation = max(self._inflation, self.ranks[slot])
