"""The bound: drop the leaf whose next use is farthest (Belady, 1966). Sees the future, so only the replay can run it.

Exact for blocks of one size: they are interchangeable, and a parent's next use is never later than its child's, so the farthest
block is always a leaf. On a fidelity ladder it is a good clairvoyant policy, but no bound.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import ClassVar

from ..errors import ConfigError
from .base import BlockId, BlockInfo, EvictionPolicy, Request
from .ranked import RankedPolicy

_NEVER = 1 << 40


class OptPolicy(RankedPolicy):
    """Rank = minus the number of the request that uses the block next; `foresee` must be called first."""

    name: ClassVar[str] = "opt"
    sees_future: ClassVar[bool] = True

    def __init__(self, config: EvictionPolicy.Config | None = None) -> None:
        super().__init__(config)
        self._next_uses: list[array[int]] = []
        self._uses: dict[BlockId, int] = {}
        self._seq = 0

    def foresee(self, requests: Sequence[Sequence[BlockId]]) -> None:
        """Tell the ids that each request is going to use; request number i is ``requests[i]``."""
        upcoming: dict[BlockId, int] = {}
        self._next_uses = [array("q")] * len(requests)
        for number in range(len(requests) - 1, -1, -1):
            row = requests[number]
            self._next_uses[number] = array("q", [upcoming.get(id, _NEVER) for id in row])
            upcoming.update(dict.fromkeys(row, number))

    def access(self, request: Request, blocks: Sequence[BlockInfo]) -> None:
        if request.seq >= len(self._next_uses):
            raise ConfigError("policy opt sees the future: only `concertina replay` can run it; choose another for a node")
        self._uses = dict(zip((block.id for block in blocks), self._next_uses[request.seq], strict=True))
        self._seq = request.seq
        super().access(request, blocks)

    def rank(self, request: Request, slot: int, fresh: bool) -> int:
        return -self._uses[self.table.ids[slot]]

    def reuse(self, slot: int, now: float) -> float:
        ahead = -self.ranks[slot] - self._seq
        return 0.0 if ahead >= _NEVER // 2 else 1.0 / ahead
