"""Products of many rows, as a prompt's are: a strip of weights stays in the processor's cache while all rows pass.

The sums are those of `services.engine.cpu.tiles`, so a row has the same bits here as in a product of few rows.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange, types, uint32

from .elements import JIT, float32_at, float_of_bits, uint16_at
from .tiles import LANES, PANEL, tile

#: Outputs of a strip: as many as the tile of four rows has.
_STRIP, _VECTORS = PANEL // 2, PANEL // 2 // LANES
_FOUR, _TWO, _ONE = (tile(rows, _VECTORS, types.float32) for rows in (4, 2, 1))
_FLOAT, _LINE = 4, 64


@njit(**JIT)
def _spread(weights, size_bytes, inputs, strip):
    """Half a panel's weights as float32, one input after the other."""
    to, halves, floats = float32_at(strip), uint16_at(weights), float32_at(weights)
    for at in range(inputs):
        for column in range(_STRIP):
            if size_bytes == _FLOAT:
                to[at * _STRIP + column] = floats[at * PANEL + column]
            else:
                to[at * _STRIP + column] = float_of_bits(uint32(halves[at * PANEL + column]) << uint32(16))


@njit(**JIT)
def _pass_rows(x, rows, inputs, out, outputs, strip):
    row, source, target = 0, inputs * _FLOAT, outputs * _FLOAT
    while row + 4 <= rows:
        _FOUR(x + row * source, inputs, 1, out + row * target, outputs, strip, _STRIP, inputs, strip, 0)
        row += 4
    if row + 2 <= rows:
        _TWO(x + row * source, inputs, 1, out + row * target, outputs, strip, _STRIP, inputs, strip, 0)
        row += 2
    if row < rows:
        _ONE(x + row * source, inputs, 1, out + row * target, outputs, strip, _STRIP, inputs, strip, 0)


@njit(parallel=True, **JIT)
def multiply_many(x, out, packed, rows, inputs, panels, size_bytes, threads):
    """out [rows, panels · PANEL] = x [rows, inputs] times packed weights of `size_bytes` each; all are addresses."""
    outputs = panels * PANEL
    for thread in prange(threads):
        memory = np.empty(inputs * _STRIP + _LINE // _FLOAT, np.float32)
        strip = memory.ctypes.data + -memory.ctypes.data % _LINE
        for number in range(thread, 2 * panels, threads):
            first = number % 2 * _STRIP
            _spread(packed + (number // 2 * inputs * PANEL + first) * size_bytes, size_bytes, inputs, strip)
            _pass_rows(x, rows, inputs, out + number * _STRIP * _FLOAT, outputs, strip)


def beats_library() -> bool:
    """Whether these are the fastest products of many rows: where vectors have as many lanes as ours, by a fifth."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"
