"""The contract of a press: which tokens of a live cache to keep.

Shape suffixes: L layer, H KV head, G query heads a KV head, T token, N kept token, D head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch

if TYPE_CHECKING:
    from services.engine.live import LiveKV

#: `Press.queries` of a press that must see every query of the prompt.
EVERY = 1 << 62
#: Score of a token that must stay.
MUST_STAY = float("inf")


class Press(ABC):
    """Keeps one request's live cache within a budget, apart for each layer and head.

    The engine calls `keep` when the prompt has been computed and the cache is at its budget, and again whenever it is full. A
    budget that is never reached changes nothing. Keys keep the rotation of the positions that they were computed at.

    Parameters
    ----------
    budget : int
        Most tokens that the cache may hold, at least `min_budget`.
    """

    name: ClassVar[str]
    min_budget: ClassVar[int] = 8
    #: Of how many of the prompt's last tokens it must `see` the queries: these are computed even where the store has their blocks, so
    #: that what is kept does not depend on the store.
    queries: ClassVar[int] = 0

    def __init__(self, budget: int) -> None:
        self.budget = budget

    def see(self, layer: int, q_HGTD: torch.Tensor, kv: LiveKV, stop: int, scale: float, window: int | None) -> None:
        """Look at the queries of the tokens in the cache's last T places before `stop`; only presses with `queries` are shown any.

        Called for every layer of every step, in order, from the model's thread, after `kv` was given the K and V of these tokens.
        """

    @abstractmethod
    def scores(self, kv: LiveKV) -> torch.Tensor:
        """What each token in `kv` is worth [L, H, T], float32; the lowest go first. `MUST_STAY` for those that may not go."""

    def keep(self, kv: LiveKV, room: int) -> torch.Tensor:
        """Places of the tokens to keep [L, H, N], ascending, with ``N = min(length, budget - room)`` but at least 1.

        `room` is what the engine wants free, so that it need not ask at every token.
        """
        count = max(1, min(kv.length, self.budget - room))
        if count == kv.length:
            kept = torch.arange(count, device=kv.device).expand(kv.layout.layers, kv.layout.kv_heads, count)
        else:
            kept = self.scores(kv).topk(count, dim=-1).indices.sort(dim=-1).values
        self.kept(kept)
        return kept

    def kept(self, places_LHN: torch.Tensor) -> None:
        """The cache is about to hold these places only: bring what was noted of them in step."""
