"""Attention of one new token for each of several requests, in one call a layer, over their own caches.

Each KV head of each request is computed by one thread, alone: its numbers depend on nothing beside it.

Shape suffixes: N token of the batch (one a request), Q query head, H KV head, G query heads a KV head, P page, T token of a page, D head
dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numba import carray, njit, prange

from services.engine.live import LiveKV, LivePool

from .elements import JIT, float32_at, uint16_at
from .heads import attend_head


@njit(parallel=True, **JIT)
def _attend(shape, q, k, v, out, k_base, v_base, page_stride, pages, size, size_bytes, tables, stops, scale, window):
    """All heads of all tokens.

    Addresses: of the tokens' q, k, v and out, each [N, heads, dim], and of K and V [H, P, T, D] of one layer, where `page_stride` is a
    head's in bytes. `shape` counts tokens, KV heads, query heads a KV head and channels.
    """
    count, heads, _, dim = shape
    q_NHGD, out_NHGD = carray(float32_at(q), shape), carray(float32_at(out), shape)
    for item in prange(count * heads):
        n, head = item // heads, item % heads
        new, cache = item * dim * size_bytes, head * page_stride
        if size_bytes == 4:
            attend_head(
                q_NHGD[n, head], out_NHGD[n, head], carray(float32_at(k + new), (dim,)), carray(float32_at(v + new), (dim,)),
                carray(float32_at(k_base + cache), (pages, size, dim)), carray(float32_at(v_base + cache), (pages, size, dim)),
                tables[n], stops[n], scale, window,
            )  # fmt: skip
        else:
            attend_head(
                q_NHGD[n, head], out_NHGD[n, head], carray(uint16_at(k + new), (dim,)), carray(uint16_at(v + new), (dim,)),
                carray(uint16_at(k_base + cache), (pages, size, dim)), carray(uint16_at(v_base + cache), (pages, size, dim)),
                tables[n], stops[n], scale, window,
            )  # fmt: skip


def can_attend_tokens(pool: LivePool) -> bool:
    """Whether such caches can be attended to here: on the CPU, in float32 or bfloat16."""
    return pool.device.type == "cpu" and pool.layout.dtype in (torch.float32, torch.bfloat16)


def page_tables(caches: Sequence[LiveKV]) -> np.ndarray:
    """int64 [caches, pages of the longest]: the pages of each, and 0 behind them."""
    tables = np.zeros((len(caches), max(len(kv.page_ids) for kv in caches)), np.int64)
    for row, kv in enumerate(caches):
        tables[row, : len(kv.page_ids)] = kv.page_ids
    return tables


class Batch:
    """Where the caches of a batch's tokens lie: one token each, which goes to the place `at` of its cache.

    Parameters
    ----------
    caches : sequence of (LiveKV, int)
        Of one pool, with room for the token.
    """

    def __init__(self, caches: Sequence[tuple[LiveKV, int]]) -> None:
        self._pool = caches[0][0].pool
        self._tables = page_tables([kv for kv, _ in caches])
        self._stops = np.array([at + 1 for _, at in caches], np.int64)

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
        q_NQD = query[0].transpose(0, 1).to(torch.float32).contiguous()
        k_NHD, v_NHD = (x[0].transpose(0, 1).to(k.dtype).contiguous() for x in (key, value))
        out = torch.empty_like(q_NQD) if query.shape[2] == count else torch.zeros_like(q_NQD)
        heads, dim = key.shape[1], key.shape[3]
        _attend(
            (count, heads, query.shape[1] // heads, dim), q_NQD.data_ptr(), k_NHD.data_ptr(), v_NHD.data_ptr(), out.data_ptr(),
            k.data_ptr(), v.data_ptr(), k.stride(0) * k.itemsize, k.shape[1], pool.block_tokens, k.itemsize, self._tables, self._stops,
            np.float32(scale), window or 0,
        )  # fmt: skip
        return out.to(query.dtype)
