"""Attention of one new token for each of several requests, in one call a layer, over their own caches.

Each KV head of each request is computed by one thread, alone: its numbers depend on nothing beside it.

Shape suffixes: N token of the batch (one a request), Q query head, H KV head, G query heads a KV head, S token of a cache, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import carray, njit, prange, types
from numba.extending import overload

from services.engine.live import LiveKV

from .elements import JIT, float32_at, float_of_bits, uint16_at

#: Sums over a head's channels and over tokens may be split over vector lanes; how is decided when this is compiled.
_REORDER = {"reassoc", "contract", "nsz", "arcp"}
_LOG2_E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
#: Of exp's polynomial on [-ln 2 / 2, ln 2 / 2], highest power first (Cephes, expf).
_EXP = tuple(np.float32(c) for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1))
#: Below it exp is taken as that of it.
_LOWEST = np.float32(-87.0)


@njit(**JIT)
def _exp(x):
    """exp(x) for x <= 0, to 2 units in the last place; free of branches, so that a loop over it becomes vector code."""
    x = max(x, _LOWEST)
    whole = np.floor(x * _LOG2_E + np.float32(0.5))
    x -= whole * _LN2_HIGH
    x -= whole * _LN2_LOW
    y = _EXP[0]
    y = y * x + _EXP[1]
    y = y * x + _EXP[2]
    y = y * x + _EXP[3]
    y = y * x + _EXP[4]
    y = y * x + _EXP[5]
    y = y * x * x + x + np.float32(1)
    return y * float_of_bits(np.uint32((np.int32(whole) + np.int32(127)) << np.int32(23)))


def _value(element):
    """The float32 that an element of a cache stands for: itself, or a bfloat16's bits."""


@overload(_value)
def _value_of(element):
    if element is types.uint16:
        return lambda element: float_of_bits(np.uint32(element) << np.uint32(16))
    return lambda element: element


@njit(fastmath=_REORDER, **JIT)
def _attend_head(q_GD, k_new_D, v_new_D, k_SD, v_SD, out_GD, scale, first):
    """Append one token to one head's K and V, and attend from it to the tokens from `first` on."""
    stop, dim = k_SD.shape
    groups = len(q_GD)
    weights_GS = np.empty((groups, stop - first), np.float32)
    totals_G = np.empty(groups, np.float32)
    for d in range(dim):
        k_SD[stop - 1, d], v_SD[stop - 1, d] = k_new_D[d], v_new_D[d]
    for s in range(first, stop):
        for g in range(groups):
            logit = np.float32(0)
            for d in range(dim):
                logit += q_GD[g, d] * _value(k_SD[s, d])
            weights_GS[g, s - first] = logit * scale
    for g in range(groups):
        weights, peak, total = weights_GS[g], np.float32(-np.inf), np.float32(0)
        for s in range(len(weights)):
            peak = max(peak, weights[s])
        for s in range(len(weights)):
            weights[s] = _exp(weights[s] - peak)
            total += weights[s]
        totals_G[g] = total
    out_GD[:] = 0
    for s in range(first, stop):
        for g in range(groups):
            weight = weights_GS[g, s - first]
            for d in range(dim):
                out_GD[g, d] += weight * _value(v_SD[s, d])
    for g in range(groups):
        for d in range(dim):
            out_GD[g, d] /= totals_G[g]


@njit(parallel=True, **JIT)
def _attend(q_NHGD, k_new, v_new, out_NHGD, places, layer, size_bytes, scale, window):
    """All heads of all tokens; `k_new` and `v_new` are addresses of [N, H, D], `places` are rows of `place`."""
    count, heads, _, dim = q_NHGD.shape
    for item in prange(count * heads):
        n, head = item // heads, item % heads
        stop = places[n, 4] + 1
        first = max(0, stop - window) if window else 0
        offset = (layer * places[n, 2] + head * places[n, 3]) * size_bytes
        new = item * dim * size_bytes
        q, out = q_NHGD[n, head], out_NHGD[n, head]
        if size_bytes == 4:
            k, v = carray(float32_at(places[n, 0] + offset), (stop, dim)), carray(float32_at(places[n, 1] + offset), (stop, dim))
            k_row, v_row = carray(float32_at(k_new + new), (dim,)), carray(float32_at(v_new + new), (dim,))
            _attend_head(q, k_row, v_row, k, v, out, scale, first)
        else:
            k2, v2 = carray(uint16_at(places[n, 0] + offset), (stop, dim)), carray(uint16_at(places[n, 1] + offset), (stop, dim))
            k2_row, v2_row = carray(uint16_at(k_new + new), (dim,)), carray(uint16_at(v_new + new), (dim,))
            _attend_head(q, k2_row, v2_row, k2, v2, out, scale, first)


def can_attend(kv: LiveKV) -> bool:
    """Whether caches of this kind can be attended to here: on the CPU, in float32 or bfloat16."""
    return kv.device.type == "cpu" and kv.layout.dtype in (torch.float32, torch.bfloat16)


def places(caches: Sequence[tuple[LiveKV, int]]) -> np.ndarray:
    """What `attend_tokens` needs of caches and the place of each one's new token: addresses of K and V, strides of layer and head."""
    return np.array([(kv.k_LHTD.data_ptr(), kv.v_LHTD.data_ptr(), *kv.k_LHTD.stride()[:2], at) for kv, at in caches], np.int64)


def attend_tokens(
    places: np.ndarray, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """Append the tokens' K and V of one layer to their caches, and attend.

    Parameters
    ----------
    places : array [N, 5]
        Of `places`. Rows of the batch beyond N are padding.
    query : Tensor [1, Q, rows, D]
    key, value : Tensor [1, H, rows, D]

    Returns
    -------
    Tensor [rows, Q, D], the query's dtype; 0 in rows of padding.
    """
    heads, rows, dim = key.shape[1:]
    count = len(places)
    q_NQD = query[0].transpose(0, 1).to(torch.float32).contiguous()
    k_NHD, v_NHD = key[0].transpose(0, 1).contiguous(), value[0].transpose(0, 1).contiguous()
    out = torch.empty_like(q_NQD) if rows == count else torch.zeros_like(q_NQD)
    shape = (rows, heads, -1, dim)
    _attend(
        q_NQD.view(shape)[:count].numpy(), k_NHD.data_ptr(), v_NHD.data_ptr(), out.view(shape).numpy(), places, layer, key.itemsize,
        np.float32(scale), window or 0,
    )  # fmt: skip
    return out.to(query.dtype)
