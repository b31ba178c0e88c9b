"""What one forward is about, in tensors of fixed shape at fixed addresses, filled by one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from services.engine.live import LiveKV

#: Numbers to which each part of a frame is rounded up, so that all begin at 128 bytes.
_ALIGNED = 16


@dataclass(frozen=True, slots=True)
class Span:
    """`count` rows of a forward from `row` on: tokens of one request, the first at place `start` of its cache."""

    kv: LiveKV
    row: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a frame: rows, spans at most, rows of the output head, and pages of a request. Spans of `tokens` are one row each."""

    tokens: bool
    rows: int
    spans: int
    wanted: int
    pages: int


class Frame:
    """Inputs of a forward, on the device.

    `ids`, `positions` and `slots` [rows] (a slot is page · page size + place, negative for padding), `wanted` rows of the output head,
    and of each span `begins` (its first row), `counts`, `starts` and `tables` [spans, pages]. All int64.

    Parameters
    ----------
    shape : Shape
    page : int
        Tokens of a page.
    device : torch.device
    """

    def __init__(self, shape: Shape, page: int, device: torch.device) -> None:
        self.shape, self.page = shape, page
        sizes = [shape.rows] * 3 + [shape.wanted] + [shape.spans] * 3 + [shape.spans * shape.pages]
        whole = [-(-size // _ALIGNED) * _ALIGNED for size in sizes]
        self._host = torch.zeros(sum(whole), dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        self._device = torch.zeros(sum(whole), dtype=torch.int64, device=device)
        self.ids, self.positions, self.slots, self.wanted, self.begins, self.counts, self.starts, tables = (
            part[:size] for part, size in zip(self._device.split(whole), sizes, strict=True)
        )
        self.tables = tables.view(shape.spans, shape.pages)
        self._parts = [part[:size].numpy() for part, size in zip(self._host.split(whole), sizes, strict=True)]

    def fill(self, ids: Sequence[int], positions: Sequence[int], wanted: Sequence[int], spans: Sequence[Span]) -> None:
        """Describe the next forward; the one before it must have ended. What is not said is padding."""
        to_ids, to_positions, slots, to_wanted, begins, counts, starts, tables = self._parts
        tables = tables.reshape(self.shape.spans, self.shape.pages)
        to_ids[:], to_positions[:], to_wanted[:] = ids, positions, wanted
        slots[:], counts[:] = -1, 0
        for number, span in enumerate(spans):
            begins[number], counts[number], starts[number] = span.row, span.count, span.start
            pages = span.kv.page_ids[: -(-(span.start + span.count) // self.page)]
            tables[number, : len(pages)] = pages
            places = np.arange(span.start, span.start + span.count)
            slots[span.row : span.row + span.count] = tables[number, places // self.page] * self.page + places % self.page
        self._device.copy_(self._host, non_blocking=True)

    def clear(self) -> None:
        """Describe a forward of padding alone."""
        shape = self.shape
        self.fill([0] * shape.rows, [0] * shape.rows, [0] * shape.wanted, ())
