"""`device.Decoder` in Triton: five kernels for a batch of any size, the last two once a group of layers.

Runs on the CPU too, under ``TRITON_INTERPRET=1``; the tests do that. `triton` is optional and imported with this module only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl

from ..entropy.book import MAX_SYMBOLS
from ..entropy.rans import LANES, LOW, PROBABILITY_BITS
from ..entropy.triton_rans import decode_kernel
from .groups import Group
from .ladder import DITHER
from .models import ACTIVE, CLASS_STEPS, CLASSES, DEAD_ZONE, SLOPE_LOW, SLOPES, SPAN, ZERO_TABLES
from .streams import Streams, upload
from .triton_cells import tables_kernel, values_kernel

if TYPE_CHECKING:
    from .device import Places
    from .projection import Projection

#: Entries of the tables that one program computes, and coefficients and tokens whose values it does.
_ENTRIES, _ROWS, _TOKENS = 1024, 16, 64


@triton.jit(do_not_specialize=["tokens", "length", "first", "layers", "largest", "kb", "kl", "kh", "kt", "vb", "vl", "vh", "vt"])
def place_kernel(
    base, product, target, cos, sin, ropes, keys, values, tokens, length, first, layers, largest,
    kb, kl, kh, kt, vb, vl, vh, vt,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Rows ``base + product`` [tokens, columns of a group] into K and V [B, L, H, T, D] of these strides, RoPE applied: one head each.

    `target` says to which token of its block a row belongs; `ropes` [L, 3] is each layer's (pairs of the tables before its own, pairs,
    interleaved); a table of ``cos`` and ``sin`` is [tokens, pairs].
    """
    n, d = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None], tl.arange(0, PADDED)[None, :]
    half = layers * HEADS
    of_keys, number = tl.program_id(1) < half, tl.program_id(1) % half
    layer, head = first + number // HEADS, number % HEADS
    before, pairs = tl.load(ropes + 3 * layer).to(tl.int64), tl.load(ropes + 3 * layer + 1)
    pairs = tl.where(of_keys, pairs, 0)
    interleaved = tl.load(ropes + 3 * layer + 2) != 0
    inside = (n < tokens) & (d < DIM)
    turned = inside & (d < 2 * pairs)
    leads = tl.where(interleaved, d % 2 == 0, d < pairs)
    pair = tl.where(interleaved, d // 2, tl.where(d < pairs, d, d - pairs))
    partner = tl.where(interleaved, d ^ 1, tl.where(d < pairs, d + pairs, d - pairs))
    row = n.to(tl.int64) * (2 * half * DIM) + tl.program_id(1) * DIM
    x = tl.load(base + row + d, mask=inside, other=0.0) + tl.load(product + row + d, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(base + row + partner, mask=turned, other=0.0)
    y += tl.load(product + row + partner, mask=turned, other=0.0).to(tl.float32)
    table = before * tokens + n * pairs + pair
    c, s = tl.load(cos + table, mask=turned, other=1.0), tl.load(sin + table, mask=turned, other=0.0)
    x = x * c + tl.where(leads, -s, s) * y
    x = tl.minimum(tl.maximum(x, -largest), largest)
    block, token = (n // length).to(tl.int64), tl.load(target + n, mask=n < tokens, other=0).to(tl.int64)
    if of_keys:
        at = block * kb + layer.to(tl.int64) * kl + head.to(tl.int64) * kh + token * kt
        tl.store(keys + at + d, x.to(keys.dtype.element_ty), mask=inside)
    else:
        at = block * vb + layer.to(tl.int64) * vl + head.to(tl.int64) * vh + token * vt
        tl.store(values + at + d, x.to(values.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class _Decoded:
    """The numbers of all jobs, and whether each job's streams were intact (int8 [G, K])."""

    decoder: TritonDecoder
    streams: Streams
    there: dict[str, torch.Tensor]
    tables: torch.Tensor
    numbers: torch.Tensor
    intact: torch.Tensor

    def values(self, group: int, out: torch.Tensor) -> None:
        """Values of a group's first coefficients into `out`, [R, tokens of all blocks], where they are coded."""
        t, d, (parts, passes) = self.there, self.decoder, self.streams.steps.shape
        values_kernel[(parts, triton.cdiv(len(out), _ROWS))](
            self.numbers, t["number_begin"], t["rows"], t["passes"], t["tokens"], t["columns"], t["steps"], t["step_sizes"],
            t["log_width"], t["width"], d.kappa, d.shape, d.centre, d.row_begin, out, group, parts, out.shape[1],
            PASSES=passes, ROWS=_ROWS, TOKENS=_TOKENS, DITHERS=len(DITHER), ACTIVE=ACTIVE, DEAD=DEAD_ZONE, SPAN=SPAN,
        )  # fmt: skip


class TritonDecoder:
    """Decodes batches of blocks on one device.

    Parameters
    ----------
    projection : Projection
        On that device.
    """

    def __init__(self, projection: Projection) -> None:
        models = projection.models
        counts = [len(k) for k in projection.kappa]
        there = upload(
            {
                "kappa": projection.kappa, "shape": projection.shape, "row_begin": [np.cumsum([0, *counts], dtype=np.int32)],
                "zero": [models.zero.astype(np.int32)], "centre": [models.centre], "slots": [models.book.slots],
                "entries": [models.book.entries.view(np.int64)],
            },
            projection.device,
        )  # fmt: skip
        self.device, self.shapes = projection.device, models.shapes
        self.kappa, self.shape, self.row_begin, self.zero, self.centre, self.slots, self.entries = there.values()

    def decode(self, streams: Streams) -> _Decoded:
        """Read all streams; returns before that is done."""
        there, (parts, passes) = streams.on(self.device), streams.steps.shape
        tables = torch.empty(streams.tables + 1, dtype=torch.int16, device=self.device)
        numbers = torch.empty(streams.numbers + 1, dtype=torch.int16, device=self.device)
        intact = torch.empty(streams.jobs, dtype=torch.int8, device=self.device)
        rows = max(_ENTRIES // passes**2, 1)
        tables_kernel[(streams.jobs, max(triton.cdiv(int(streams.rows.max()), rows), 1))](
            there["rows"], there["passes"], there["steps"], there["parts"], there["log_width"], there["table_begin"], tables,
            self.kappa, self.shape, self.zero, self.row_begin, parts, PASSES=passes, ROWS=rows, DITHERS=len(DITHER), ACTIVE=ACTIVE,
            CLASS_STEPS=CLASS_STEPS, CLASSES=CLASSES, SPAN=SPAN, SHAPES=self.shapes, ZERO_TABLES=ZERO_TABLES, SLOPE_LOW=SLOPE_LOW,
            SLOPES=SLOPES,
        )  # fmt: skip
        decode_kernel[(streams.jobs,)](
            there["words"], there["word_begin"], there["word_count"], there["rows"], there["passes"], there["tokens"], tables,
            there["table_begin"], numbers, there["number_begin"], intact, self.slots, self.entries, parts,
            PASSES=passes, LANES=LANES, LOW=LOW, BITS=PROBABILITY_BITS, SYMBOLS=MAX_SYMBOLS, num_warps=1,
        )  # fmt: skip
        return _Decoded(self, streams, there, tables, numbers, intact)

    def place(
        self, group: Group, base: torch.Tensor, product: torch.Tensor, places: Places, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Rows ``base + product`` [N, columns] into the group's layers of K and V [B, L, H, T, D], RoPE applied."""
        heads, dim = keys.shape[2], keys.shape[4]
        padded, layers, tokens = triton.next_power_of_2(dim), group.last - group.first, len(base)
        some = max(2048 // padded, 1)
        place_kernel[(triton.cdiv(tokens, some), 2 * layers * heads)](
            base, product, places.target, places.cos, places.sin, places.ropes, keys, values, tokens, keys.shape[3], group.first, layers,
            torch.finfo(keys.dtype).max, *keys.stride()[:4], *values.stride()[:4],
            HEADS=heads, DIM=dim, PADDED=padded, TOKENS=some,
        )  # fmt: skip
