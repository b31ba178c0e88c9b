"""``snapkv``: what the prompt's last queries attend to, with its neighbours (Li et al., "SnapKV: LLM Knows What You are Looking for Before
Generation", arXiv 2404.14469, §4).

The last `WINDOW` queries vote by their attention; votes are pooled over neighbouring tokens, so that a detail keeps its context; the
window itself always stays. The paper compresses the prompt once; here the answer's last queries vote again whenever the budget
is full.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from services.engine.live import LiveKV

from .base import MUST_STAY
from .observing import RecentQueries

#: Queries that vote, and width of the pooling (the paper's, §5).
WINDOW, POOL = 32, 5


class SnapKv(RecentQueries):
    """Votes of a window of queries, for each KV head."""

    name = "snapkv"
    queries = WINDOW

    def scores(self, kv: LiveKV) -> torch.Tensor:
        votes_LHT = torch.stack([self.attention(layer, kv).mean((1, 2)) for layer in range(kv.layout.layers)])
        pooled = functional.avg_pool1d(votes_LHT, POOL, stride=1, padding=POOL // 2, count_include_pad=False)
        pooled[..., -min(WINDOW, self.budget // 2) :] = MUST_STAY
        return pooled
