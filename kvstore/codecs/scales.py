"""Scales of the integer codecs: how channels are grouped, and rounding that never clips."""

from __future__ import annotations

import torch

GROUP_CHANNELS = 64


def groups_of(head_dim: int) -> int:
    """Groups of channels that share a scale within one head: of 64, or the whole head where that does not divide."""
    return head_dim // GROUP_CHANNELS if head_dim % GROUP_CHANNELS == 0 else 1


def bfloat16_up(x: torch.Tensor) -> torch.Tensor:
    """The smallest bfloat16 not below the finite, non-negative float32 `x` (the largest finite one at most)."""
    bits = x.contiguous().view(torch.int32) + 0xFFFF
    return (bits & ~0xFFFF).view(torch.float32).clamp_max(torch.finfo(torch.bfloat16).max).to(torch.bfloat16)
