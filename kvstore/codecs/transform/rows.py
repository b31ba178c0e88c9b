"""Between a cache's K and V and the rows that are transformed, on the CPU: one pass over the values each way, compiled by numba.

A row holds a token's values of one group, ordered as `groups` says, in float32. On the way in RoPE is undone and what is known of the
token beforehand subtracted; on the way out the rarer coefficients are added, RoPE applied, and values rounded to the cache's type.

Legend: T tokens of one block, C columns of a group, R coefficients, U different tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import torch

from kvstore.layout import KVLayout
from kvstore.rope import RopeSpec

from ..floats import elements, narrowed, widened
from .groups import Group

_jit = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines for every token of a batch of blocks, and the layers of a group that they hold for.

    Parameters
    ----------
    first, last : int
        Model layers, counted from the group's first.
    cos, sin : float32 [blocks, T, pairs]
    interleaved : bool
    """

    first: int
    last: int
    cos: np.ndarray
    sin: np.ndarray
    interleaved: bool


class Rotations:
    """The rotations of a batch, each computed once.

    Parameters
    ----------
    layout : KVLayout
    positions : int64 [blocks, T]
    inverse : bool
        Undo RoPE instead of applying it.
    """

    def __init__(self, layout: KVLayout, positions: torch.Tensor, *, inverse: bool) -> None:
        self.layout, self.positions, self.inverse = layout, positions, inverse
        self._tables: dict[RopeSpec, tuple[np.ndarray, np.ndarray]] = {}

    def of(self, group: Group) -> list[Rotation]:
        """Runs of layers that share a rotation."""
        runs: list[Rotation] = []
        for layer in range(group.first, group.last):
            spec, at = self.layout.rope.for_layer(layer), layer - group.first
            cos, sin = self._table(spec)
            first = at
            if runs and runs[-1].cos is cos:
                first = runs.pop().first
            runs.append(Rotation(first, at + 1, cos, sin, spec.interleaved))
        return runs

    def _table(self, spec: RopeSpec) -> tuple[np.ndarray, np.ndarray]:
        if spec not in self._tables:
            self._tables[spec] = tuple(t.numpy() for t in spec.tables(self.positions, inverse=self.inverse))
        return self._tables[spec]


class Cache:
    """The layers of one group in a batch of K and V, addressed by block.

    Parameters
    ----------
    k_BLHTD, v_BLHTD : Tensor
        On the CPU, any strides but a dense last dimension.
    group : Group
    rotations : list of Rotation
    """

    def __init__(self, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor, group: Group, rotations: list[Rotation]) -> None:
        self.parts = tuple(x[:, group.first : group.last] for x in (k_BLHTD, v_BLHTD))
        self.arrays = tuple(elements(x) for x in self.parts)
        self.rotations = rotations
        self.largest = np.float32(torch.finfo(k_BLHTD.dtype).max)

    def take(self, block: int, rows_TC: np.ndarray) -> None:
        """The block's values as rows, RoPE undone."""
        for x, data, rotation, at, column in self._runs(block):
            tables = rotation.cos[block], rotation.sin[block], rotation.interleaved
            _take(data, at, x.stride()[1:], _shape(x, rotation), *tables, rows_TC, column)

    def put(self, block: int, rows_TC: np.ndarray) -> None:
        """The inverse of `take`: rows into the cache, RoPE applied."""
        for x, data, rotation, at, column in self._runs(block):
            tables = rotation.cos[block], rotation.sin[block], rotation.interleaved
            _put(data, at, x.stride()[1:], _shape(x, rotation), *tables, self.largest, rows_TC, column)

    def _runs(self, block: int):  # type: ignore[no-untyped-def]
        """Each run of layers of K, then all of V: its tensor, elements, rotation, where it starts in those and in a row."""
        keys, values = self.parts
        layer = keys.shape[2] * keys.shape[4]
        for r in self.rotations:
            yield keys, self.arrays[0], r, keys[block, r.first].storage_offset(), r.first * layer
        layers, tokens = keys.shape[1], keys.shape[3]
        still = np.empty((len(keys), tokens, 0), dtype=np.float32)
        yield values, self.arrays[1], Rotation(0, layers, still, still, False), values[block].storage_offset(), layers * layer


def _shape(x_BLHTD: torch.Tensor, run: Rotation) -> tuple[int, int, int, int]:
    return run.last - run.first, x_BLHTD.shape[2], x_BLHTD.shape[3], x_BLHTD.shape[4]


@_jit
def _turn(x, cos, sin, interleaved):  # type: ignore[no-untyped-def]
    """Rotate the leading pairs of one head in place."""
    half = cos.size
    if interleaved:
        for i in range(half):
            a, b = x[2 * i], x[2 * i + 1]
            x[2 * i], x[2 * i + 1] = a * cos[i] - b * sin[i], b * cos[i] + a * sin[i]
    else:
        for i in range(half):
            a, b = x[i], x[half + i]
            x[i], x[half + i] = a * cos[i] - b * sin[i], b * cos[i] + a * sin[i]


@_jit
def _take(data, base, strides, shape, cos, sin, interleaved, rows, column):  # type: ignore[no-untyped-def]
    layers, heads, tokens, dim = shape
    for token in range(tokens):
        at = column
        for layer in range(layers):
            for head in range(heads):
                begin = base + layer * strides[0] + head * strides[1] + token * strides[2]
                source, target = data[begin : begin + dim], rows[token, at : at + dim]
                for i in range(dim):
                    target[i] = widened(source[i])
                _turn(target, cos[token], sin[token], interleaved)
                at += dim


@_jit
def _put(data, base, strides, shape, cos, sin, interleaved, largest, rows, column):  # type: ignore[no-untyped-def]
    layers, heads, tokens, dim = shape
    one = data.dtype.type(0)
    for layer in range(layers):
        for head in range(heads):
            begin = column + (layer * heads + head) * dim
            for token in range(tokens):
                at = base + layer * strides[0] + head * strides[1] + token * strides[2]
                source, target = rows[token, begin : begin + dim], data[at : at + dim]
                _turn(source, cos[token], sin[token], interleaved)
                for i in range(dim):
                    target[i] = narrowed(min(max(source[i], -largest), largest), one)


@_jit
def subtract_known(rows, known, which):  # type: ignore[no-untyped-def]
    """Take from each row float32 [T, C] that of `known` [U, C] which `which` [T] names."""
    for t in range(rows.shape[0]):
        row, base = rows[t], known[which[t]]
        for i in range(row.size):
            row[i] -= base[i]


@_jit
def set_known(rows, known, which):  # type: ignore[no-untyped-def]
    """Set each row to that of `known` which `which` names."""
    for t in range(rows.shape[0]):
        rows[t] = known[which[t]]


@_jit
def add_rare(values, rows, first_row, basis):  # type: ignore[no-untyped-def]
    """Add coefficients that are mostly 0, float32 [R', T], times their rows `first_row` … of `basis` [R, C] to `rows` [T, C].

    A multiplication for each value that is not 0, where a matrix product would make one for each: quicker below a third of them.
    """
    count, tokens = values.shape
    for r in range(count):
        source = basis[first_row + r]
        for t in range(tokens):
            value = values[r, t]
            if value != 0:
                target = rows[t]
                for i in range(target.size):
                    target[i] += value * widened(source[i])
