"""The contract of a press: which tokens of a live cache to keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar


class Press(ABC):
    """Keeps one request's live cache within a budget.

    The engine calls `keep` when the prompt has been computed and the cache is above its budget, and again whenever it is full. A
    budget that is never reached changes nothing.

    Parameters
    ----------
    budget : int
        Most tokens that the cache may hold, at least `min_budget`.
    """

    name: ClassVar[str]
    min_budget: ClassVar[int] = 1

    def __init__(self, budget: int) -> None:
        self.budget = budget

    @abstractmethod
    def keep(self, length: int, room: int) -> list[tuple[int, int]]:
        """Ranges [start, stop) of a cache of `length` tokens to keep, in order and apart.

        Together they hold at most ``budget - room`` tokens (but at least one), `room` being what the engine wants free so that it
        need not ask at every token.
        """
