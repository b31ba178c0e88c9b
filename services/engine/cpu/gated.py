"""`GatedMLP`: the feed-forward part of a layer (Shazeer, 2020: SwiGLU) with its activation in one pass of native code.

    down(silu(gate(x)) · up(x)),  silu(a) = a / (1 + exp(-a))

torch goes over the two wide products four times, which takes a quarter as long as computing them.
"""

from __future__ import annotations

import torch
from numba import float32, int32, njit, prange, uint32
from torch import nn

from .elements import JIT, float32_at, float_of_bits
from .products import RowLinear

#: Rows from which on threads share the work.
_MANY = 16
#: exp(-a) is taken of numbers between these, where it is neither 0 nor infinite in float32.
_LEAST, _MOST = float32(-87.0), float32(87.0)
_LOG2_E, _LN2_HIGH, _LN2_LOW = float32(1.44269504), float32(0.693359375), float32(-2.12194440e-4)
#: Adding and taking away this rounds to a whole number.
_ROUND = float32(1.5 * 2**23)
#: exp(r) = 1 + r + r² · p(r) for |r| ≤ ln(2) / 2, highest power first (Cephes, expf).
_P0, _P1, _P2 = float32(1.9875691500e-4), float32(1.3981999507e-3), float32(8.3334519073e-3)
_P3, _P4, _P5 = float32(4.1665795894e-2), float32(1.6666665459e-1), float32(5.0000001201e-1)


@njit(fastmath={"contract"}, **JIT)
def _gate(gate, up, out, size):
    a, b, target = float32_at(gate), float32_at(up), float32_at(out)
    for at in range(size):
        x = min(max(-a[at], _LEAST), _MOST)
        whole = (x * _LOG2_E + _ROUND) - _ROUND
        r = x - whole * _LN2_HIGH - whole * _LN2_LOW
        p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
        power = float_of_bits(uint32(int32(whole) + int32(127)) << uint32(23))
        target[at] = a[at] / (float32(1) + (p * r * r + r + float32(1)) * power) * b[at]


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
