"""Attention of all rows of one forward, in two or three launches a layer."""

from __future__ import annotations

import math

import torch
import triton

from services.engine.live import LivePool

from .frame import Frame
from .kernels import attend_parts, attend_tiles, merge_parts, write_rows

#: Keys of a request that one program attends to while decoding. Fixed, so that a token's numbers depend on its cache alone.
PART = 512
#: Parts that are merged at a time.
PARTS_AT_ONCE = 16
#: Query heads from which on there are enough programs for each to take more rows of a tile, of 16-bit numbers.
MANY_HEADS = 24
#: Bytes of a channel row up to which a program takes 64 keys at a time; beyond, they would not fit beside each other.
WIDE_ROW_BYTES = 512


class Batch:
    """Attends to the caches that `frame` names, in the pages of `pool`.

    Shape suffixes as in `kernels`.
    """

    def __init__(self, pool: LivePool, frame: Frame) -> None:
        layout = pool.layout
        self._pool, self._frame = pool, frame
        #: Whether some layer has a window.
        self.windowed = False
        block_d = max(16, triton.next_power_of_2(layout.head_dim))
        block_n = 64 if block_d * layout.dtype.itemsize <= WIDE_ROW_BYTES else 32
        self._blocks = {"DIM": layout.head_dim, "BLOCK_D": block_d}
        self._keys = {
            "PAGE": pool.block_tokens, "PRECISION": "ieee" if layout.dtype == torch.float32 else "tf32", "BLOCK_N": block_n,
            "num_stages": 2, "num_warps": 4,
        }  # fmt: skip
        self._parts: tuple[torch.Tensor, ...] = ()

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:  # fmt: skip
        """Add K and V of all rows in one layer to their caches, and attend.

        Parameters
        ----------
        query : Tensor [1, Q, N, D]
        key, value : Tensor [1, H, N, D]

        Returns
        -------
        Tensor [N, Q, D], the query's dtype; 0 in rows of padding.
        """
        self.windowed |= bool(window)
        k_cache, v_cache = self._pool.k_LHPTD[layer], self._pool.v_LHPTD[layer]
        q_QND, k_HND, v_HND = ((x[0] if x.stride(3) == 1 else x[0].contiguous()).to(k_cache.dtype) for x in (query, key, value))
        write_rows[(k_HND.shape[1], k_HND.shape[0])](
            k_HND, v_HND, k_cache, v_cache, self._frame.slots, k_cache.stride(0), k_HND.stride(0), k_HND.stride(1), v_HND.stride(0),
            v_HND.stride(1), **self._blocks, num_warps=1,
        )  # fmt: skip
        attend = self._attend_tokens if self._frame.shape.tokens else self._attend_tiles
        return attend(q_QND, k_cache, v_cache, scale * math.log2(math.e), window or 0).to(query.dtype)

    def _attend_tiles(self, q_QND, k_cache, v_cache, scale_log2, window) -> torch.Tensor:
        frame, shape, heads = self._frame, self._frame.shape, k_cache.shape[0]
        out_NQD = torch.zeros((q_QND.shape[1], q_QND.shape[0], q_QND.shape[2]), dtype=q_QND.dtype, device=q_QND.device)
        groups = q_QND.shape[0] // heads
        block_m = 64 if q_QND.shape[0] >= MANY_HEADS and q_QND.itemsize == 2 else 32
        attend_tiles[(triton.cdiv(frame.page * groups, block_m), heads, shape.spans)](
            q_QND, out_NQD, k_cache, v_cache, frame.begins, frame.counts, frame.starts, frame.tables, shape.pages, k_cache.stride(0),
            q_QND.stride(0), q_QND.stride(1), out_NQD.stride(0), scale_log2,
            GROUPS=groups, WINDOW=window, BLOCK_M=block_m, **self._blocks, **self._keys,
        )  # fmt: skip
        return out_NQD

    def _attend_tokens(self, q_QND, k_cache, v_cache, scale_log2, window) -> torch.Tensor:
        frame, shape, heads = self._frame, self._frame.shape, k_cache.shape[0]
        out_NQD = torch.empty((q_QND.shape[1], q_QND.shape[0], q_QND.shape[2]), dtype=q_QND.dtype, device=q_QND.device)
        count = triton.cdiv(shape.pages * frame.page, PART)
        if not self._parts:
            rows = (shape.spans, q_QND.shape[0], count)
            self._parts = tuple(
                torch.empty(size, dtype=torch.float32, device=q_QND.device) for size in ((*rows, q_QND.shape[2]), rows, rows)
            )
        groups = q_QND.shape[0] // heads
        attend_parts[(count, heads, shape.spans)](
            q_QND, *self._parts, k_cache, v_cache, frame.counts, frame.starts, frame.tables, shape.pages, k_cache.stride(0),
            q_QND.stride(0), q_QND.stride(1), scale_log2,
            GROUPS=groups, WINDOW=window, BLOCK_M=max(16, triton.next_power_of_2(groups)), PART=PART, **self._blocks, **self._keys,
        )  # fmt: skip
        merge_parts[(q_QND.shape[0], shape.spans)](
            *self._parts, out_NQD, frame.counts, frame.starts, count, out_NQD.stride(0),
            WINDOW=window, PART=PART, BLOCK_N=self._keys["BLOCK_N"], BLOCK_P=PARTS_AT_ONCE, **self._blocks, num_warps=2,
        )  # fmt: skip
        return out_NQD
