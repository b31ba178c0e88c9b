"""`RowNorm`: root-mean-square normalization (Zhang and Sennrich, 2019) in one launch.

Written as in transformers it is eight, of which a small step on a GPU has more than of anything else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import nn

from services.engine.norms import replace_norms, same_on_noise, weight_and_eps

#: Channels from which on a row has eight warps.
_WIDE = 2048


@triton.jit
def _normalize(x, factors, out, size, eps, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    source = tl.load(x + row * size + at, mask=inside, other=0.0).to(tl.float32)
    normal = source * tl.rsqrt(tl.sum(source * source, 0) / size + eps)
    if ROUNDS:
        normal = normal.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + at, normal * tl.load(factors + at, mask=inside, other=0.0).to(tl.float32), mask=inside)


class RowNorm(nn.Module):
    """x · factors / sqrt(mean(x²) + eps) over the last dimension, computed in float32; each row alone.

    Parameters
    ----------
    factors : Tensor [size]
    eps : float
    rounds : bool
        Whether what is to be multiplied by the factors is rounded to the type of `x` first.
    """

    def __init__(self, factors: torch.Tensor, eps: float, rounds: bool) -> None:
        super().__init__()
        self.register_buffer("factors", factors.contiguous(), persistent=False)
        self.eps, self.rounds, self.size = float(eps), rounds, len(factors)
        self._block = triton.next_power_of_2(self.size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        _normalize[(x.numel() // self.size,)](
            x, self.factors, out, self.size, self.eps, ROUNDS=self.rounds, BLOCK=self._block, num_warps=8 if self.size >= _WIDE else 4
        )
        return out


@torch.inference_mode()
def fitting(module: nn.Module) -> RowNorm | None:
    """What may stand for `module`, if it is an RMSNorm that makes the same of noise: some scale by 1 + weight."""
    if (found := weight_and_eps(module)) is None:
        return None
    weight, eps = found
    near = 4 * torch.finfo(weight.dtype).eps
    for ours in (RowNorm(weight, eps, rounds=True), RowNorm(1 + weight.float(), eps, rounds=False)):
        if same_on_noise(ours, module, near, near):
            return ours
    return None


def use_row_norms(model: nn.Module) -> None:
    """Replace those modules of `model`, which is on a GPU, that are RMSNorms."""
    replace_norms(model, fitting)
