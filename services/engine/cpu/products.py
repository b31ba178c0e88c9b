"""`RowLinear`: a linear layer whose rows do not influence each other, for decode steps on the CPU."""

from __future__ import annotations

import torch
from numba import njit, prange, types
from torch import nn
from torch.nn import functional

from .elements import JIT
from .tiles import PANEL, tile

#: Distances in bytes.
_FLOAT, _HALF_PANEL = 4, PANEL // 2
#: (rows, vectors of outputs) of tiles, by the weights' type: with weights and inputs they fill the 16 registers.
_FOUR_F32, _FOUR_BF16 = (tile(4, 3, weight, asks_ahead=True) for weight in (types.float32, types.uint16))
_TWO_F32, _TWO_BF16 = (tile(2, 3, weight) for weight in (types.float32, types.uint16))
_ONE_F32, _ONE_BF16 = (tile(1, 6, weight) for weight in (types.float32, types.uint16))


@njit(**JIT)
def _four_rows(x, inputs, out, outputs, weights, size_bytes, ahead, ahead_step):
    for half in range(2):
        target, part = out + half * _HALF_PANEL * _FLOAT, weights + half * _HALF_PANEL * size_bytes
        if size_bytes == _FLOAT:
            _FOUR_F32(x, inputs, target, outputs, part, PANEL, inputs, ahead, ahead_step)
        else:
            _FOUR_BF16(x, inputs, target, outputs, part, PANEL, inputs, ahead, ahead_step)
        ahead += inputs * ahead_step


@njit(**JIT)
def _two_rows(x, inputs, out, outputs, weights, size_bytes):
    for half in range(2):
        target, part = out + half * _HALF_PANEL * _FLOAT, weights + half * _HALF_PANEL * size_bytes
        if size_bytes == _FLOAT:
            _TWO_F32(x, inputs, target, outputs, part, PANEL, inputs, part, 0)
        else:
            _TWO_BF16(x, inputs, target, outputs, part, PANEL, inputs, part, 0)


@njit(**JIT)
def _one_row(x, inputs, out, outputs, weights, size_bytes):
    if size_bytes == _FLOAT:
        _ONE_F32(x, inputs, out, outputs, weights, PANEL, inputs, weights, 0)
    else:
        _ONE_BF16(x, inputs, out, outputs, weights, PANEL, inputs, weights, 0)


@njit(parallel=True, **JIT)
def _multiply(x, out, packed, rows, inputs, panels, size_bytes):
    """out [rows, panels · PANEL] = x [rows, inputs] times packed weights of `size_bytes` each; all are addresses.

    Four rows take long enough over a panel for the next one to come from memory meanwhile; each two passes of theirs ask for a part.
    """
    outputs, panel_bytes = panels * PANEL, inputs * PANEL * size_bytes
    share = PANEL * size_bytes // (2 * max(rows // 4, 1))
    for panel in prange(panels):
        weights = packed + panel * panel_bytes
        source, target, row, ahead = x, out + panel * PANEL * _FLOAT, 0, weights + panel_bytes
        while row + 4 <= rows:
            _four_rows(source, inputs, target, outputs, weights, size_bytes, ahead, share)
            ahead += 2 * inputs * share
            source, target, row = source + 4 * inputs * _FLOAT, target + 4 * outputs * _FLOAT, row + 4
        if row + 2 <= rows:
            _two_rows(source, inputs, target, outputs, weights, size_bytes)
            source, target, row = source + 2 * inputs * _FLOAT, target + 2 * outputs * _FLOAT, row + 2
        if row < rows:
            _one_row(source, inputs, target, outputs, weights, size_bytes)


class RowLinear(nn.Module):
    """The same function as a linear layer; products of fewer than `tile` rows are computed row by row over packed weights.

    Takes no gradients. Holds the given weights, for products of many rows, and the packed copy.

    Parameters
    ----------
    linear : nn.Linear
        On the CPU, float32 or bfloat16. float32 weights that are bfloat16 numbers, as those of models that were trained in it, are
        packed as such and take half the memory and time.
    tile : int
        Rows from which on the library's product is taken.
    """

    def __init__(self, linear: nn.Linear, tile: int) -> None:
        super().__init__()
        self.weight, self.bias, self.tile = linear.weight, linear.bias, tile
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._panels = -(-linear.out_features // PANEL)
        self._packed = _pack(linear.weight.detach(), self._panels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // self.in_features
        if not 0 < rows < self.tile:
            return functional.linear(x, self.weight, self.bias)
        source = x.to(torch.float32).contiguous()
        out = source.new_empty((*x.shape[:-1], self._panels * PANEL))
        packed = self._packed
        _multiply(source.data_ptr(), out.data_ptr(), packed.data_ptr(), rows, self.in_features, self._panels, packed.itemsize)
        out = out[..., : self.out_features].to(x.dtype)
        return out if self.bias is None else out + self.bias


def _pack(weight: torch.Tensor, panels: int) -> torch.Tensor:
    """Weights [outputs, inputs] as [panels, inputs, PANEL], the last panel filled with zeros; bfloat16 where that loses nothing."""
    exact = weight.to(torch.bfloat16)
    if torch.equal(exact.to(weight.dtype), weight):
        weight = exact
    padded = functional.pad(weight, (0, 0, 0, panels * PANEL - weight.shape[0]))
    return padded.view(panels, PANEL, -1).transpose(1, 2).contiguous()


def use_row_products(model: nn.Module, tile: int) -> None:
    """Replace the linear layers of `model`, where it is on the CPU in float32 or bfloat16, by `RowLinear`."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and module.weight.dtype in (torch.float32, torch.bfloat16):
            model.set_submodule(name, RowLinear(module, tile))
