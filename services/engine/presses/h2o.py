"""``h2o``: heavy hitters and recent tokens, half each (Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large
Language Models", arXiv 2306.14048, §4).

A heavy hitter is a token that much attention has gone to, summed over all queries since the prompt began; so every query of the prompt
must be seen, and a request with this press takes nothing from the store.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from services.engine.live import LiveKV

from .base import EVERY, MUST_STAY, Press
from .observing import weights


class H2o(Press):
    """Largest sums of attention, for each KV head, and the most recent tokens."""

    name = "h2o"
    queries = EVERY

    def __init__(self, budget: int) -> None:
        super().__init__(budget)
        self._sums_HT: dict[int, torch.Tensor] = {}

    def see(self, layer: int, q_HGTD: torch.Tensor, kv: LiveKV, stop: int, scale: float, window: int | None) -> None:
        sums = weights(layer, q_HGTD, kv, stop, scale, window).sum((1, 2))
        before = self._sums_HT.get(layer)
        if before is not None:
            sums += functional.pad(before, (0, stop - before.shape[1]))
        self._sums_HT[layer] = sums

    def scores(self, kv: LiveKV) -> torch.Tensor:
        sums_LHT = torch.stack([self._sums_HT[layer] for layer in range(kv.layout.layers)])
        sums_LHT[..., -(self.budget // 2) :] = MUST_STAY
        return sums_LHT

    def kept(self, places_LHN: torch.Tensor) -> None:
        self._sums_HT = {layer: sums.gather(1, places_LHN[layer]) for layer, sums in self._sums_HT.items()}
