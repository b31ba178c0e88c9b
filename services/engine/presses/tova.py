"""``tova``: drop what the last query attends to least (Oren et al., "Transformers are Multi-State RNNs", arXiv 2401.06104, §3.2).

Attention is averaged over all heads of a layer, so a layer's heads keep the same tokens. Unlike the paper, a sixteenth of the budget goes
at once instead of one token at each step.
"""

from __future__ import annotations

import torch

from services.engine.live import LiveKV

from .observing import RecentQueries


class Tova(RecentQueries):
    """Most attended by the last token."""

    name = "tova"
    queries = 1

    def scores(self, kv: LiveKV) -> torch.Tensor:
        layers, heads = kv.layout.layers, kv.layout.kv_heads
        mean_LT = torch.stack([self.attention(layer, kv).mean((0, 1, 2)) for layer in range(layers)])
        return mean_LT[:, None].expand(layers, heads, kv.length)
