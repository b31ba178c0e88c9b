"""Scales of the integer codecs: how channels are grouped, and rounding that never clips."""

from __future__ import annotations

import torch

GROUP_CHANNELS = 64


def groups_of(head_dim: int) -> int:
    """Groups of channels that share a scale within one head: of 64, or the whole head where that does not divide."""
    return head_dim // GROUP_CHANNELS if head_dim % GROUP_CHANNELS == 0 else 1


def divided(x: torch.Tensor, by: float) -> torch.Tensor:
    """`x` / `by`, correctly rounded. By a plain number torch multiplies with the reciprocal on CUDA, which gives other scales than here."""
    return x / torch.full((), by, dtype=x.dtype, device=x.device)


def round_down(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The largest value of the 16-bit `dtype` that is not above the float32 `x`; never infinite."""
    near = x.to(dtype)
    bits = near.view(torch.int16)
    below = torch.where(near > 0, bits - 1, torch.where(near < 0, bits + 1, -0x7FFF)).to(torch.int16).view(dtype)
    largest = torch.finfo(dtype).max
    return torch.where(near.float() > x, below, near).clamp(-largest, largest)


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of a stored scale for values of `dtype`: 16 bits, with the range of `dtype`."""
    return torch.float16 if dtype == torch.float16 else torch.bfloat16


def round_up(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The smallest value of the 16-bit `dtype` that is not below the finite, non-negative float32 `x`.

    The next float up is the next integer up of its bits. Infinite when `x` lies above the largest finite value.
    """
    near = x.to(dtype)
    return (near.view(torch.int16) + (near.float() < x)).to(torch.int16).view(dtype)


def largest_scale(dtype: torch.dtype, top: float) -> float:
    """The largest scale by which the code `top` still decodes to a finite value of `dtype`."""
    largest = torch.finfo(dtype).max
    near = torch.tensor(largest / top).to(scale_dtype(dtype))
    if float(near) * top > largest:
        near = (near.view(torch.int16) - 1).to(torch.int16).view(near.dtype)
    return float(near)
