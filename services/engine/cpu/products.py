"""`RowLinear`: a linear layer whose rows do not influence each other, on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import groupby

import numba
import torch
from numba import njit, prange, types
from torch import nn
from torch.nn import functional

from .elements import JIT
from .many import beats_library, multiply_many
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
            _FOUR_F32(x, inputs, 1, target, outputs, part, PANEL, inputs, ahead, ahead_step)
        else:
            _FOUR_BF16(x, inputs, 1, target, outputs, part, PANEL, inputs, ahead, ahead_step)
        ahead += inputs * ahead_step


@njit(**JIT)
def _two_rows(x, inputs, out, outputs, weights, size_bytes):
    for half in range(2):
        target, part = out + half * _HALF_PANEL * _FLOAT, weights + half * _HALF_PANEL * size_bytes
        if size_bytes == _FLOAT:
            _TWO_F32(x, inputs, 1, target, outputs, part, PANEL, inputs, part, 0)
        else:
            _TWO_BF16(x, inputs, 1, target, outputs, part, PANEL, inputs, part, 0)


@njit(**JIT)
def _one_row(x, inputs, out, outputs, weights, size_bytes):
    if size_bytes == _FLOAT:
        _ONE_F32(x, inputs, 1, out, outputs, weights, PANEL, inputs, weights, 0)
    else:
        _ONE_BF16(x, inputs, 1, out, outputs, weights, PANEL, inputs, weights, 0)


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
    """The same function as a linear layer, computed row by row over packed weights.

    Takes no gradients. Holds the given weights, for the library's products of many rows, and the packed copy.

    Parameters
    ----------
    linear : nn.Linear
        On the CPU, float32 or bfloat16. float32 weights that are bfloat16 numbers, as those of models that were trained in it, are
        packed as such and take half the memory and time.
    tile : int
        Rows from which on a product is one of many: `services.engine.cpu.many`'s where that is faster than the library's.
    """

    def __init__(self, linear: nn.Linear, tile: int) -> None:
        super().__init__()
        self.weight, self.bias, self.tile = linear.weight, linear.bias, tile
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._panels = _Panels.of(linear)
        self._native = linear.weight.dtype == torch.float32 and beats_library()
        self._span = slice(0, linear.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // self.in_features
        many = rows >= self.tile
        if not rows or (many and not self._native):
            return functional.linear(x, self.weight, self.bias)
        out = self._panels.product(x, rows, many)[..., self._span]
        if out.dtype != x.dtype:
            out = out.to(x.dtype)
        return out if self.bias is None else out + self.bias


class _Panels:
    """Packed weights of one layer, or of several that are given the same rows one after the other and are computed together.

    Parameters
    ----------
    packed : Tensor [panels, inputs, PANEL], float32 or bfloat16
    layers : int
        How many they are of.
    """

    def __init__(self, packed: torch.Tensor, layers: int) -> None:
        self.packed, self.layers = packed, layers
        self._count, self._inputs, _ = packed.shape
        self._address, self._itemsize = packed.data_ptr(), packed.itemsize
        self._known: tuple[torch.Tensor, torch.Tensor] | None = None
        self._left = 0

    @classmethod
    def of(cls, linear: nn.Linear) -> _Panels:
        return cls(_pack(linear.weight.detach(), -(-linear.out_features // PANEL)), 1)

    def product(self, x: torch.Tensor, rows: int, many: bool) -> torch.Tensor:
        """All outputs [..., panels · PANEL] for `x`, float32; for further layers of the group those that were computed for the first."""
        if self._known is not None and self._known[0] is x:
            out = self._known[1]
            self._left -= 1
            if not self._left:
                self._known = None
            return out
        source = x if x.dtype is torch.float32 else x.to(torch.float32)
        source = source if source.is_contiguous() else source.contiguous()
        out = torch.empty((*x.shape[:-1], self._count * PANEL), dtype=torch.float32)
        given = source.data_ptr(), out.data_ptr(), self._address, rows, self._inputs, self._count, self._itemsize
        if many:
            multiply_many(*given, numba.get_num_threads())
        else:
            _multiply(*given)
        if self.layers > 1:
            self._known, self._left = (x, out), self.layers - 1
        return out


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


def join_siblings(model: nn.Module, step: Callable[[], object]) -> None:
    """Have those `RowLinear` layers that `step`, a decode step, calls one after the other with the same tensor computed in one product.

    Which layers these are, such as queries, keys and values, is seen rather than told from their names. Rows keep their bits. A call
    costs about as much as a small layer's product, so a step of one row takes a fifth less time.
    """
    calls: list[tuple[RowLinear, torch.Tensor]] = []
    layers = [module for module in model.modules() if isinstance(module, RowLinear)]
    if not layers:
        return
    hooks = [layer.register_forward_pre_hook(lambda layer, given: calls.append((layer, given[0]))) for layer in layers]
    try:
        step()
    finally:
        for hook in hooks:
            hook.remove()
    once = Counter(id(layer) for layer, _ in calls)
    for _, together in groupby(calls, key=lambda call: id(call[1])):  # `calls` keeps the tensors, so no two have one id
        group = [layer for layer, _ in together]
        alike = {layer._panels.packed.dtype for layer in group}
        if len(group) > 1 and len(alike) == 1 and all(once[id(layer)] == 1 and layer._panels.layers == 1 for layer in group):
            _join(group)


def _join(layers: list[RowLinear]) -> None:
    panels = _Panels(torch.cat([layer._panels.packed for layer in layers]), len(layers))
    first = 0
    for layer in layers:
        layer._span = slice(first, first + layer.out_features)
        first += len(layer._panels.packed) * PANEL
        layer._panels = panels
