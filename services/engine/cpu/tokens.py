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

from services.engine.live import LiveKV, LivePool

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
def _logits(q_GD, k_TD, start, stop, scale, out_GS, at):
    """out[:, at…] of the tokens from `start` to `stop` of a page."""
    for t in range(start, stop):
        for g in range(len(q_GD)):
            logit = np.float32(0)
            for d in range(k_TD.shape[1]):
                logit += q_GD[g, d] * _value(k_TD[t, d])
            out_GS[g, at + t - start] = logit * scale


@njit(fastmath=_REORDER, **JIT)
def _softmax(weights_S):
    """In place, but for the division by the sum, which is returned."""
    peak, total = np.float32(-np.inf), np.float32(0)
    for s in range(len(weights_S)):
        peak = max(peak, weights_S[s])
    for s in range(len(weights_S)):
        weights_S[s] = _exp(weights_S[s] - peak)
        total += weights_S[s]
    return total


@njit(fastmath=_REORDER, **JIT)
def _mix(weights_GS, at, v_TD, start, stop, out_GD):
    """Add the values of the tokens from `start` to `stop` of a page."""
    for t in range(start, stop):
        for g in range(len(out_GD)):
            weight = weights_GS[g, at + t - start]
            for d in range(v_TD.shape[1]):
                out_GD[g, d] += weight * _value(v_TD[t, d])


@njit(**JIT)
def _span(page, size, first, stop):
    """Of the tokens from `first` to `stop` of a cache: those in page number `page`, by their places in it, and how many come before."""
    start = max(first - page * size, 0)
    return start, min(stop - page * size, size), page * size + start - first


@njit(parallel=True, **JIT)
def _attend(q_NHGD, out_NHGD, k_base, v_base, tables, stops, size, page_stride, size_bytes, scale, window):
    """All heads of all tokens; the bases are addresses of K and V [H, P, T, D] of one layer, `page_stride` is a head's in bytes."""
    count, heads, groups, dim = q_NHGD.shape
    for item in prange(count * heads):
        n, head = item // heads, item % heads
        stop = stops[n]
        first = max(0, stop - window) if window else 0
        q, out = q_NHGD[n, head], out_NHGD[n, head]
        weights = np.empty((groups, stop - first), np.float32)
        for page in range(first // size, (stop - 1) // size + 1):
            start, end, at = _span(page, size, first, stop)
            address = k_base + head * page_stride + tables[n, page] * size * dim * size_bytes
            if size_bytes == 4:
                _logits(q, carray(float32_at(address), (size, dim)), start, end, scale, weights, at)
            else:
                _logits(q, carray(uint16_at(address), (size, dim)), start, end, scale, weights, at)
        out[:] = 0
        totals = np.empty(groups, np.float32)
        for g in range(groups):
            totals[g] = _softmax(weights[g])
        for page in range(first // size, (stop - 1) // size + 1):
            start, end, at = _span(page, size, first, stop)
            address = v_base + head * page_stride + tables[n, page] * size * dim * size_bytes
            if size_bytes == 4:
                _mix(weights, at, carray(float32_at(address), (size, dim)), start, end, out)
            else:
                _mix(weights, at, carray(uint16_at(address), (size, dim)), start, end, out)
        for g in range(groups):
            for d in range(dim):
                out[g, d] /= totals[g]


def can_attend(pool: LivePool) -> bool:
    """Whether such caches can be attended to here: on the CPU, in float32 or bfloat16."""
    return pool.device.type == "cpu" and pool.layout.dtype in (torch.float32, torch.bfloat16)


class Batch:
    """Where the caches of a batch's tokens lie: one token each, which goes to the place `at` of its cache.

    Parameters
    ----------
    caches : sequence of (LiveKV, int)
        Of one pool, with room for the token.
    """

    def __init__(self, caches: Sequence[tuple[LiveKV, int]]) -> None:
        self._pool = pool = caches[0][0].pool
        self._tables = np.zeros((len(caches), max(len(kv.page_ids) for kv, _ in caches)), np.int64)
        for row, (kv, _) in enumerate(caches):
            self._tables[row, : len(kv.page_ids)] = kv.page_ids
        self._stops = np.array([at + 1 for _, at in caches], np.int64)
        last = [(kv.page_ids[at // pool.block_tokens], at % pool.block_tokens) for kv, at in caches]
        self._pages, self._places = (torch.tensor(x) for x in zip(*last, strict=True))

    def __len__(self) -> int:
        return len(self._stops)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:  # fmt: skip
        """Add the tokens' K and V of one layer to their caches, and attend.

        Parameters
        ----------
        query : Tensor [1, Q, rows, D]
        key, value : Tensor [1, H, rows, D]
            Rows beyond the batch are padding.

        Returns
        -------
        Tensor [rows, Q, D], the query's dtype; 0 in rows of padding.
        """
        count, pool = len(self), self._pool
        k, v = pool.k_LHPTD[layer], pool.v_LHPTD[layer]
        k[:, self._pages, self._places], v[:, self._pages, self._places] = key[0, :, :count], value[0, :, :count]
        q_NQD = query[0].transpose(0, 1).to(torch.float32).contiguous()
        out = torch.empty_like(q_NQD) if query.shape[2] == count else torch.zeros_like(q_NQD)
        shape = (query.shape[2], key.shape[1], -1, key.shape[3])
        _attend(
            q_NQD.view(shape)[:count].numpy(), out.view(shape)[:count].numpy(), k.data_ptr(), v.data_ptr(), self._tables, self._stops,
            pool.block_tokens, k.stride(0) * k.itemsize, k.itemsize, np.float32(scale), window or 0,
        )  # fmt: skip
        return out.to(query.dtype)
