"""Attention of one new token in one KV head, over the pages of its cache.

Where pages and channels come in the right multiples, logits and mixtures are the tiles of `dots` and `tiles`; else plain loops.

Shape suffixes: G query heads of the KV head, P page, T token of a page, S token of a cache from the first page in reach on, D head dim.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

from .dots import dots
from .elements import JIT, exp, float_of_bits
from .tiles import LANES, tile

#: Queries, keys and vectors of channels that tiles take at once: with them and their sums the 16 registers are full.
_QUERIES, _KEYS, _VECTORS = 3, 4, 4
_SPAN = _VECTORS * LANES
_LOGITS_F32, _LOGITS_BF16 = (dots(_QUERIES, _KEYS, kind) for kind in (types.float32, types.uint16))
_LOGITS_OF_ONE_F32, _LOGITS_OF_ONE_BF16 = (dots(1, _KEYS, kind) for kind in (types.float32, types.uint16))
_MIX_F32, _MIX_BF16 = (tile(_QUERIES, _VECTORS, kind, grows=True) for kind in (types.float32, types.uint16))
_MIX_FOR_ONE_F32, _MIX_FOR_ONE_BF16 = (tile(1, _VECTORS, kind, grows=True) for kind in (types.float32, types.uint16))
#: Bytes of a float32.
_FLOAT = 4
#: Sums over a head's channels and over tokens may be split over vector lanes; how is decided when this is compiled.
_REORDER = {"reassoc", "contract", "nsz", "arcp"}


def _value(element):
    """The float32 that an element of a cache stands for: itself, or a bfloat16's bits."""


@overload(_value)
def _value_of(element):
    if element is types.uint16:
        return lambda element: float_of_bits(np.uint32(element) << np.uint32(16))
    return lambda element: element


@njit(**JIT)
def _logits_in_tiles(q, k, groups, dim, first, stop, scale, out, stride, bfloat16):
    """out[:, first:stop] of a page's tokens, multiples of `_KEYS`; addresses of q, of the page's K and of out, its rows `stride` apart."""
    size_bytes = 2 if bfloat16 else _FLOAT
    g = 0
    while g < groups:
        several = groups - g >= _QUERIES
        for t in range(first, stop, _KEYS):
            keys, target = k + t * dim * size_bytes, out + t * _FLOAT
            if several and bfloat16:
                _LOGITS_BF16(q, dim, keys, dim, scale, target, stride)
            elif several:
                _LOGITS_F32(q, dim, keys, dim, scale, target, stride)
            elif bfloat16:
                _LOGITS_OF_ONE_BF16(q, dim, keys, dim, scale, target, stride)
            else:
                _LOGITS_OF_ONE_F32(q, dim, keys, dim, scale, target, stride)
        done = _QUERIES if several else 1
        g, q, out = g + done, q + done * dim * _FLOAT, out + done * stride * _FLOAT


@njit(fastmath=_REORDER, **JIT)
def _logits(q_GD, k_TD, start, stop, scale, out_GT):
    """out[:, start:stop] of a page's tokens."""
    for t in range(start, stop):
        for g in range(len(q_GD)):
            logit = np.float32(0)
            for d in range(k_TD.shape[1]):
                logit += q_GD[g, d] * _value(k_TD[t, d])
            out_GT[g, t] = logit * scale


@njit(fastmath=_REORDER, **JIT)
def _softmax(weights_S):
    """In place, but for the division by the sum, which is returned."""
    peak, total = np.float32(-np.inf), np.float32(0)
    for s in range(len(weights_S)):
        peak = max(peak, weights_S[s])
    for s in range(len(weights_S)):
        weights_S[s] = exp(weights_S[s] - peak)
        total += weights_S[s]
    return total


@njit(**JIT)
def _mix_in_tiles(weights, stride, v, groups, dim, count, out, bfloat16):
    """Add `count` tokens' values; addresses of the first one's weights, whose rows are `stride` apart, of its values and of out."""
    size_bytes = 2 if bfloat16 else _FLOAT
    g = 0
    while g < groups:
        several = groups - g >= _QUERIES
        for d in range(0, dim, _SPAN):
            values, target = v + d * size_bytes, out + d * _FLOAT
            if several and bfloat16:
                _MIX_BF16(weights, stride, 1, target, dim, values, dim, count, values, 0)
            elif several:
                _MIX_F32(weights, stride, 1, target, dim, values, dim, count, values, 0)
            elif bfloat16:
                _MIX_FOR_ONE_BF16(weights, stride, 1, target, dim, values, dim, count, values, 0)
            else:
                _MIX_FOR_ONE_F32(weights, stride, 1, target, dim, values, dim, count, values, 0)
        done = _QUERIES if several else 1
        g, weights, out = g + done, weights + done * stride * _FLOAT, out + done * dim * _FLOAT


@njit(fastmath=_REORDER, **JIT)
def _mix(weights_GT, v_TD, start, stop, out_GD):
    """Add the values of a page's tokens."""
    for t in range(start, stop):
        for g in range(len(out_GD)):
            weight = weights_GT[g, t]
            for d in range(v_TD.shape[1]):
                out_GD[g, d] += weight * _value(v_TD[t, d])


@njit(**JIT)
def attend_head(q_GD, out_GD, new_k_D, new_v_D, k_PTD, v_PTD, table, stop, scale, window):
    """Put the token's K and V at the end of the cache, place `stop` - 1, then attend to all that its window reaches (0: everything)."""
    (groups, dim), size = q_GD.shape, k_PTD.shape[1]
    tiled, bfloat16 = size % _KEYS == 0 and dim % _SPAN == 0, k_PTD.itemsize < _FLOAT
    page, place = table[(stop - 1) // size], (stop - 1) % size
    k_PTD[page, place], v_PTD[page, place] = new_k_D, new_v_D
    first = max(0, stop - window) if window else 0
    begin, pages = first // size * size, (stop - 1) // size + 1 - first // size
    weights_GS = np.empty((groups, pages * size), np.float32)
    stride = pages * size
    for number in range(pages):
        start, end = max(first - begin - number * size, 0), min(stop - begin - number * size, size)
        k_TD = k_PTD[table[begin // size + number]]
        if tiled:  # whole tiles, some of whose tokens nobody looks at
            start, end = start // _KEYS * _KEYS, -(-end // _KEYS) * _KEYS
            out = weights_GS.ctypes.data + number * size * _FLOAT
            _logits_in_tiles(q_GD.ctypes.data, k_TD.ctypes.data, groups, dim, start, end, scale, out, stride, bfloat16)
        else:
            _logits(q_GD, k_TD, start, end, scale, weights_GS[:, number * size : (number + 1) * size])
    totals = np.empty(groups, np.float32)
    for g in range(groups):
        totals[g] = _softmax(weights_GS[g, first - begin : stop - begin])
    out_GD[:] = 0
    for number in range(pages):
        start, end = max(first - begin - number * size, 0), min(stop - begin - number * size, size)
        v_TD = v_PTD[table[begin // size + number]]
        if tiled:
            weights = weights_GS.ctypes.data + (number * size + start) * _FLOAT
            _mix_in_tiles(weights, stride, v_TD[start:].ctypes.data, groups, dim, end - start, out_GD.ctypes.data, bfloat16)
        else:
            _mix(weights_GS[:, number * size : (number + 1) * size], v_TD, start, end, out_GD)
    for g in range(groups):
        for d in range(dim):
            out_GD[g, d] /= totals[g]
