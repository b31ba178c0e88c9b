"""Attention of prompt tiles, in one call a layer, over the pages of their caches.

A page of keys at a time, with the sums corrected as larger logits come (Milakov and Gimelshein, 2018; FlashAttention, Dao et al.,
2022). Queries lie side by side, a column each, so keys and values are read where and as they are, and softmax is vertical: nothing is
ever summed across a vector. The heads of a tile that share a KV head are computed by one thread, every column on its own: its numbers
depend on nothing beside it.

Shape suffixes: N row of the flat batch, Q query head, H KV head, P page, T token of a page, D head dim, C column (a query of one
head).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numba
import numpy as np
import torch
from numba import njit, prange, types

from services.engine.live import LivePool

from .elements import JIT, exp, float32_at
from .many import beats_library
from .tiles import LANES, tile
from .tokens import page_tables

if TYPE_CHECKING:
    from services.engine.attention import Tile

#: Rows and vectors of columns that are computed at once.
_ROWS, _VECTORS = 4, 3
_SPAN = _VECTORS * LANES
_LOGITS, _MIX = tile(_ROWS, _VECTORS, types.float32), tile(_ROWS, _VECTORS, types.float32, grows=True)
#: Query heads at most that are computed together: more columns than these have do not fit the processor's cache.
_TOGETHER = 4
_FLOAT, _LINE = 4, 64
#: The logit of a key that a query may not see.
_HIDDEN = np.float32(-3e38)


@njit(**JIT)
def _turn(q, head_step, row_step, heads, count, dim, wide, scale, to):
    """[D, C] of the queries; columns beyond them are 0."""
    source, target = float32_at(q), float32_at(to)
    for d in range(dim):
        for column in range(heads * count, wide):
            target[d * wide + column] = 0
    for head in range(heads):
        for row in range(count):
            first, column = head * head_step + row * row_step, head * count + row
            for d in range(dim):
                target[d * wide + column] = source[first + d] * scale


@njit(**JIT)
def _cover(logits, wide, heads, count, at, keys, window, value):
    """Set what a query may not see of `keys` that begin `at` places behind the first query (before it: negative)."""
    target = float32_at(logits)
    for key in range(keys):
        first, stop = min(max(at + key, 0), count), count
        if window:
            stop = min(max(at + key + window, first), count)
        for head in range(heads):
            row = key * wide + head * count
            for column in range(first):
                target[row + column] = value
            for column in range(stop, count):
                target[row + column] = value


@njit(fastmath={"nnan"}, **JIT)
def _rise(logits, keys, wide, peak):
    """The largest logits so far; four keys at a time, since of one at a time no vector code is made."""
    source, most = float32_at(logits), float32_at(peak)
    for first in range(0, keys - 3, 4):
        for column in range(wide):
            largest = most[column]
            for key in range(4):
                largest = max(largest, source[(first + key) * wide + column])
            most[column] = largest
    for key in range(keys // 4 * 4, keys):
        for column in range(wide):
            most[column] = max(most[column], source[key * wide + column])


@njit(fastmath={"contract"}, **JIT)
def _weigh(logits, keys, wide, peak, factor):
    """exp of each column's logits, less the largest so far; `factor` is what sums over keys before are to be multiplied with."""
    weights, most, change = float32_at(logits), float32_at(peak), float32_at(factor)
    for column in range(wide):
        change[column] = most[column]
    _rise(logits, keys, wide, peak)
    for column in range(wide):
        change[column] = exp(change[column] - most[column])
    for key in range(keys):
        for column in range(wide):
            weights[key * wide + column] = exp(weights[key * wide + column] - most[column])


@njit(**JIT)
def _add(weights, keys, wide, factor, total, mixed, dim):
    """Correct the sums over keys before, and add these to the totals."""
    source, change, sums, mixture = float32_at(weights), float32_at(factor), float32_at(total), float32_at(mixed)
    same = True
    for column in range(wide):
        same &= change[column] == 1
        sums[column] *= change[column]
    for key in range(keys):
        for column in range(wide):
            sums[column] += source[key * wide + column]
    if not same:
        for d in range(dim):
            for column in range(wide):
                mixture[d * wide + column] *= change[column]


@njit(**JIT)
def _attend_page(turned, k, v, keys, dim, size, wide, heads, count, at, window, weights, mixed, peak, factor, total):
    """`keys` of one page, the first of them `at` places behind the first query. All are addresses but the numbers."""
    row = wide * _FLOAT
    for column in range(0, wide, _SPAN):
        for key in range(0, keys, _ROWS):  # a few more than there are: nobody looks at them
            out = weights + key * row + column * _FLOAT
            _LOGITS(k + key * dim * _FLOAT, dim, 1, out, wide, turned + column * _FLOAT, wide, dim, k, 0)
    covered = at + keys > 1 or (window > 0 and at + window < count)
    if covered:
        _cover(weights, wide, heads, count, at, keys, window, _HIDDEN)
    _weigh(weights, keys, wide, peak, factor)
    if covered:
        _cover(weights, wide, heads, count, at, keys, window, np.float32(0))
    _add(weights, keys, wide, factor, total, mixed, dim)
    for column in range(0, wide, _SPAN):
        for d in range(0, dim, _ROWS):
            out = mixed + d * row + column * _FLOAT
            _MIX(v + d * _FLOAT, 1, dim, out, wide, weights + column * _FLOAT, wide, keys, v, 0)


@njit(**JIT)
def _attend_heads(q, head_step, row_step, out, out_step, k, v, page_bytes, table, start, count, heads, dim, size, scale, window, memory):
    """`heads` query heads of one KV head for `count` tokens, the first at place `start` of its cache; `memory` has room to work in."""
    wide = -(-heads * count // _SPAN) * _SPAN
    turned = memory
    weights = turned + dim * wide * _FLOAT
    mixed = weights + -(-size // _ROWS) * _ROWS * wide * _FLOAT
    peak = mixed + dim * wide * _FLOAT
    factor, total = peak + wide * _FLOAT, peak + 2 * wide * _FLOAT
    _turn(q, head_step, row_step, heads, count, dim, wide, scale, turned)
    peaks, mixture, totals = float32_at(peak), float32_at(mixed), float32_at(total)
    for column in range(wide):
        peaks[column], totals[column] = _HIDDEN, 0
    for at in range(dim * wide):
        mixture[at] = 0
    first = max(0, start - window + 1) // size if window else 0
    for number in range(first, (start + count - 1) // size + 1):
        place = number * size
        keys, page = min(size, start + count - place), table[number] * page_bytes
        _attend_page(
            turned, k + page, v + page, keys, dim, size, wide, heads, count, place - start, window, weights, mixed, peak, factor, total
        )  # fmt: skip
    target = float32_at(out)
    for head in range(heads):
        for row in range(count):
            column = head * count + row
            for d in range(dim):
                target[row * out_step + head * dim + d] = mixture[d * wide + column] / totals[column]


@njit(parallel=True, **JIT)
def _attend(shape, q, q_head, q_row, k, v, kv_head, kv_row, out, k_base, v_base, head_step, tables, tiles_I4, scale, window, room, threads):
    """All tiles. Addresses of q, k and v [heads, N, D], with steps in elements, of out [N, Q, D] and of a layer's caches [H, P, T, D].

    `shape` has KV heads, query heads a KV head, how many of them are computed together, channels and tokens of a page; a row of
    `tiles_I4` the tile's row in the batch, its first place in its cache, its tokens, and its number.
    """
    heads, groups, together, dim, size = shape
    parts = -(-groups // together)
    page_bytes, jobs = size * dim * _FLOAT, len(tiles_I4) * heads
    for thread in prange(threads):
        for job in range(thread, jobs, threads):
            row, start, count, number = tiles_I4[job // heads]
            head = job % heads
            page, place = tables[number, start // size], start % size
            for x, base in ((k, k_base), (v, v_base)):
                source, target = float32_at(x), float32_at(base + head * head_step + page * page_bytes)
                for token in range(count):
                    for d in range(dim):
                        target[(place + token) * dim + d] = source[head * kv_head + (row + token) * kv_row + d]
    for thread in prange(threads):
        memory = np.empty(room, np.float32)
        aligned = memory.ctypes.data + -memory.ctypes.data % _LINE
        for job in range(thread, jobs * parts, threads):
            row, start, count, number = tiles_I4[job // (heads * parts)]
            head, first = job // parts % heads, job % parts * together
            query, cache = head * groups + first, head * head_step
            _attend_heads(
                q + (query * q_head + row * q_row) * _FLOAT, q_head, q_row,
                out + (row * heads * groups + query) * dim * _FLOAT, heads * groups * dim,
                k_base + cache, v_base + cache, page_bytes, tables[number], start, count, min(together, groups - first), dim, size,
                scale, window, aligned,
            )  # fmt: skip


def can_attend_prompts(pool: LivePool) -> bool:
    """Whether such caches can be attended to here, and faster than by torch: in float32, see `beats_library`."""
    layout = pool.layout
    fitting = pool.block_tokens % _ROWS == 0 and layout.head_dim % _ROWS == 0
    return pool.device.type == "cpu" and layout.dtype == torch.float32 and fitting and beats_library()


class Prompts:
    """The tiles of one forward. Those of one cache are in order, and see what those before them put there.

    Parameters
    ----------
    tiles : sequence of Tile
        Their caches are of one pool, with room for their tokens.
    """

    def __init__(self, tiles: Sequence[Tile]) -> None:
        self._pool = tiles[0].kv.pool
        self._rows = sum(tile.count for tile in tiles)
        self._tables = page_tables([part.kv for part in tiles])
        self._tiles_I4 = np.array([(part.row, part.start, part.count, number) for number, part in enumerate(tiles)], np.int64)
        self._columns = max(part.count for part in tiles)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:  # fmt: skip
        """As `services.engine.attention.Native`: float32 [N, Q, D]."""
        pool, dim, size = self._pool, key.shape[3], self._pool.block_tokens
        k, v = pool.k_LHPTD[layer], pool.v_LHPTD[layer]
        # [heads, N, D] whose channels lie side by side, and K and V alike.
        q_QND, k_HND, v_HND = (x[0] if x.stride(3) == 1 else x[0].contiguous() for x in (query, key, value))
        if k_HND.stride() != v_HND.stride():
            k_HND, v_HND = k_HND.contiguous(), v_HND.contiguous()
        whole = self._rows == query.shape[2]
        out_NQD = (torch.empty if whole else torch.zeros)((query.shape[2], query.shape[1], dim), dtype=torch.float32)
        heads, groups = key.shape[1], query.shape[1] // key.shape[1]
        together = -(-groups // -(-groups // _TOGETHER))
        wide = -(-together * self._columns // _SPAN) * _SPAN
        room = wide * (2 * dim + size + 3) + _LINE // _FLOAT
        _attend(
            (heads, groups, together, dim, size), q_QND.data_ptr(), q_QND.stride(0), q_QND.stride(1), k_HND.data_ptr(), v_HND.data_ptr(),
            k_HND.stride(0), k_HND.stride(1), out_NQD.data_ptr(), k.data_ptr(), v.data_ptr(), k.stride(0) * _FLOAT, self._tables,
            self._tiles_I4, np.float32(scale), window or 0, room, numba.get_num_threads(),
        )  # fmt: skip
        return out_NQD
