"""``sliding_window``: the first tokens and the most recent ones (StreamingLLM, arXiv 2309.17453, §3.2).

The first few tokens, the attention sinks, take up attention that has no better place; without them a window breaks down. Unlike the
paper, keys keep the positions that they were computed at.
"""

from __future__ import annotations

import torch

from services.engine.live import LiveKV

from .base import MUST_STAY, Press

#: Four are enough for every model of the paper.
SINK_TOKENS = 4


class SlidingWindow(Press):
    """Sinks and window."""

    name = "sliding_window"

    def scores(self, kv: LiveKV) -> torch.Tensor:
        recency = torch.arange(kv.length, dtype=torch.float32, device=kv.device)
        recency[:SINK_TOKENS] = MUST_STAY
        return recency.expand(kv.layout.layers, kv.layout.kv_heads, kv.length)
