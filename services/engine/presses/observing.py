"""What presses that look at attention have in common: attention weights, and memory of the last queries.

Shape suffixes as in `base`; W the queries that are remembered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from services.engine.live import LiveKV

from .base import Press


def weights(layer: int, q_HGTD: torch.Tensor, kv: LiveKV, stop: int, scale: float, window: int | None) -> torch.Tensor:
    """Attention [H, G, T, stop], float32, of the queries of the last T places before `stop`."""
    logits = q_HGTD.float() @ kv.layer(layer, stop)[0][:, None].float().mT * scale
    hidden = kv.hidden(layer, q_HGTD.shape[2], stop, window)
    return logits.masked_fill_(hidden[:, None], float("-inf")).softmax(-1)


@dataclass(slots=True)
class _Recent:
    """The last queries of one layer, and how its attention uses them."""

    q_HGWD: torch.Tensor
    scale: float
    window: int | None


class RecentQueries(Press):
    """Remembers the last `queries` queries of each layer since tokens were dropped, and scores by what they attend to."""

    def __init__(self, budget: int) -> None:
        super().__init__(budget)
        self._recent: dict[int, _Recent] = {}

    def see(self, layer: int, q_HGTD: torch.Tensor, kv: LiveKV, stop: int, scale: float, window: int | None) -> None:
        before = self._recent.get(layer)
        queries = q_HGTD if before is None else torch.cat((before.q_HGWD, q_HGTD), 2)
        self._recent[layer] = _Recent(queries[:, :, -self.queries :].clone(), scale, window)

    def attention(self, layer: int, kv: LiveKV) -> torch.Tensor:
        """Weights [H, G, W, T] of the remembered queries, the last of which belongs to the last token."""
        seen = self._recent[layer]
        return weights(layer, seen.q_HGWD, kv, kv.length, seen.scale, seen.window)

    def kept(self, places_LHN: torch.Tensor) -> None:
        # Places have moved, and with them what each of these queries may look at.
        self._recent.clear()
