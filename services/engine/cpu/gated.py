"""`GatedMLP`: the feed-forward part of a layer (Shazeer, 2020: SwiGLU) with its activation in one pass of native code.

    down(silu(gate(x)) · up(x)),  silu(a) = a / (1 + exp(-a))

torch goes over the two wide products four times, which takes a quarter as long as computing them.
"""

from __future__ import annotations

import torch
from numba import float32, njit, prange
from torch import nn

from .elements import JIT, exp, float32_at
from .products import RowLinear

#: Rows from which on threads share the work.
_MANY = 16
#: exp(-a) is taken of no more than this, where it is not yet infinite in float32.
_MOST = float32(87.0)


@njit(fastmath={"contract"}, **JIT)
def _gate(gate, up, out, size):
    a, b, target = float32_at(gate), float32_at(up), float32_at(out)
    for at in range(size):
        target[at] = a[at] / (float32(1) + exp(min(-a[at], _MOST))) * b[at]


@njit(**JIT)
def _few(gate, gate_step, up, up_step, out, rows, size):
    for row in range(rows):
        _gate(gate + row * gate_step, up + row * up_step, out + row * size * 4, size)


@njit(parallel=True, **JIT)
def _many(gate, gate_step, up, up_step, out, rows, size):
    for row in prange(rows):
        _gate(gate + row * gate_step, up + row * up_step, out + row * size * 4, size)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up, all [..., rows, size] in float32 on the CPU, the last dimension dense; rows keep their bits in any company."""
    size = gate.shape[-1]
    out = torch.empty(gate.shape, dtype=torch.float32)
    rows = out.numel() // size
    run = _few if rows < _MANY else _many
    run(gate.data_ptr(), gate.stride(-2) * 4, up.data_ptr(), up.stride(-2) * 4, out.data_ptr(), rows, size)
    return out


class GatedMLP(nn.Module):
    """The function of a model's own module with these three layers."""

    def __init__(self, gate: RowLinear, up: RowLinear, down: RowLinear) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


@torch.inference_mode()
def use_gated_mlps(model: nn.Module) -> None:
    """Replace those modules of `model` with `RowLinear` layers in float32 that are this function, as what they make of noise tells."""
    for name, module in list(model.named_modules()):
        layers = [getattr(module, part, None) for part in ("gate_proj", "up_proj", "down_proj")]
        if not all(isinstance(layer, RowLinear) and layer.weight.dtype == torch.float32 for layer in layers):
            continue
        ours = GatedMLP(*layers)
        noise = torch.randn((1, 3, layers[0].in_features), generator=torch.Generator().manual_seed(0))
        if torch.allclose(ours(noise), module(noise), rtol=1e-4, atol=1e-5):
            model.set_submodule(name, ours)
