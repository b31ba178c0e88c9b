"""`RowNorm`: root-mean-square normalization (Zhang and Sennrich, 2019) in one pass of native code, row by row.

Written as in transformers it is seven operations on a tensor. In a decode step each costs more to call than to compute: the weights
that stream through the caches between two calls have thrown out whatever it takes to call one.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
import torch
from numba import float32, njit, prange
from torch import nn

from services.engine.norms import replace_norms, same_on_noise, weight_and_eps

from .elements import JIT, float32_at

#: Rows from which on threads share the work.
_MANY = 16


@njit(fastmath={"reassoc", "contract"}, **JIT)
def _row(x, weight, out, size, eps):
    source, factors, target = float32_at(x), float32_at(weight), float32_at(out)
    total = float32(0)
    for at in range(size):
        total += source[at] * source[at]
    scale = float32(1) / sqrt(total / float32(size) + eps)
    for at in range(size):
        target[at] = source[at] * scale * factors[at]


@njit(**JIT)
def _few(x, weight, out, rows, size, eps):
    for row in range(rows):
        _row(x + row * size * 4, weight, out + row * size * 4, size, eps)


@njit(parallel=True, **JIT)
def _many(x, weight, out, rows, size, eps):
    for row in prange(rows):
        _row(x + row * size * 4, weight, out + row * size * 4, size, eps)


class RowNorm(nn.Module):
    """x · factors / sqrt(mean(x²) + eps) over the last dimension, in float32.

    Parameters
    ----------
    factors : Tensor [size], float32
        On the CPU.
    eps : float
    """

    def __init__(self, factors: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("factors", factors.contiguous(), persistent=False)
        self.eps, self.size = np.float32(eps), len(factors)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        out, rows = torch.empty_like(x), x.numel() // self.size
        run = _few if rows < _MANY else _many
        run(x.data_ptr(), self.factors.data_ptr(), out.data_ptr(), rows, self.size, self.eps)
        return out


def fitting(module: nn.Module) -> RowNorm | None:
    """What may stand for `module`, if it is an RMSNorm in float32 on the CPU."""
    found = weight_and_eps(module)
    if found is None or found[0].device.type != "cpu" or found[0].dtype != torch.float32:
        return None
    weight, eps = found
    for ours in (RowNorm(weight, eps), RowNorm(1 + weight, eps)):
        if same_on_noise(ours, module, rtol=1e-5, atol=1e-6):
            return ours
    return None


def use_row_norms(model: nn.Module) -> None:
    """Replace those modules of `model` that are RMSNorms in float32 on the CPU by `RowNorm`."""
    replace_norms(model, fitting)
