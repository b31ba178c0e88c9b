"""Least recently used leaf first: what vLLM and SGLang do when they free a chain of blocks from its tail."""

from __future__ import annotations

from typing import ClassVar

from .base import Request
from .ranked import RankedPolicy


class LruPolicy(RankedPolicy):
    """The leaf whose last request is longest ago goes first; of one request's, the deepest."""

    name: ClassVar[str] = "lru"

    def rank(self, request: Request, slot: int, fresh: bool) -> int:
        return request.seq
