"""``knorm``: the keys with the smallest norm (Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
arXiv 2406.11430, §3).

Keys of a small norm are those that attention goes to, whatever the query; so nothing of attention need be seen.
"""

from __future__ import annotations

import torch

from services.engine.live import LiveKV

from .base import Press


class KNorm(Press):
    """Smallest norms first."""

    name = "knorm"

    def scores(self, kv: LiveKV) -> torch.Tensor:
        return -torch.linalg.vector_norm(kv.keys(), dim=-1, dtype=torch.float32)
