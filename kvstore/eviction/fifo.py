"""First in, first out, leaves first: the age since insertion alone decides."""

from __future__ import annotations

from typing import ClassVar

from .base import Request
from .ranked import RankedPolicy


class FifoPolicy(RankedPolicy):
    """The leaf that has been resident longest goes first."""

    name: ClassVar[str] = "fifo"

    def rank(self, request: Request, slot: int, fresh: bool) -> int:
        return request.seq if fresh else self.ranks[slot]
