"""What the next step down costs a block: share of its quality lost, per share of its bytes freed.

A block may be demoted to any lower rung, or dropped. Of these steps the one that loses least per byte is the block's next step;
where a codec's lower rungs are so bad that dropping frees bytes more cheaply, dropping is the next step. Value of a step =
expected reuse x loss per byte (DESIGN §8). Bytes are counted in units of the block's full size, because the time that a block
saves grows with its tokens as its full size does: dropping a whole block costs 1 whatever its length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Step:
    """`rung` to go to (None: drop), `loss`, the share of quality lost per share of the full size freed, and the share held now."""

    rung: int | None
    loss: float
    share: float = 1.0


def steps(sizes: tuple[int, ...], losses: tuple[float, ...]) -> tuple[Step, ...]:
    """The cheapest next step from each rung.

    Parameters
    ----------
    sizes : tuple of int
        Bytes at each rung, falling.
    losses : tuple of float
        Share of quality gone at each rung, rising from 0; the rest, down to 1, goes with a drop.
    """
    full = max(sizes[0], 1)
    targets = [*zip(range(len(sizes)), sizes, losses, strict=True), (None, 0, 1.0)]
    return tuple(
        min(
            (Step(to, max(lost - losses[rung], 0.0) * full / max(size - less, 1), size / full) for to, less, lost in targets[rung + 1 :]),
            key=lambda step: step.loss,
        )
        for rung, size in enumerate(sizes)
    )


class StepTable:
    """Numbers the different ladders of blocks, so that a block keeps one byte instead of tuples.

    Relative sizes are rounded to 1/32 of the full size and losses to steps of about 9 %, so there are few. When `limit` numbers
    are given out, further ladders share the last one of as many rungs.
    """

    def __init__(self, limit: int = 200) -> None:
        self.limit = limit
        self.rows: list[tuple[Step, ...]] = []
        self._exact: dict[tuple[tuple[int, ...], tuple[float, ...]], int] = {}
        self._rounded: dict[tuple[tuple[int, ...], ...], int] = {}
        self._last: tuple[Any, Any, int] = (None, None, 0)  # most blocks in a row have one and the same ladder

    def number(self, sizes: tuple[int, ...], losses: tuple[float, ...]) -> int:
        """The number of this ladder; the same for ladders that cost about the same."""
        if sizes is self._last[0] and losses is self._last[1]:
            return self._last[2]
        found = self._exact.get((sizes, losses))
        if found is None:
            found = self._round(sizes, losses)
        self._last = sizes, losses, found
        return found

    def first(self, sizes: tuple[int, ...], losses: tuple[float, ...]) -> Step:
        """The next step of a whole block with this ladder."""
        return self.rows[self.number(sizes, losses)][0]

    def _round(self, sizes: tuple[int, ...], losses: tuple[float, ...]) -> int:
        rounded = (
            tuple(round(32 * size / max(sizes[0], 1)) for size in sizes),
            tuple(round(8 * math.log2(max(loss, 1e-6))) for loss in losses),
        )
        found = self._rounded.get(rounded)
        if found is None:
            found = self._new(rounded, steps(sizes, losses))
        if len(self._exact) < 4 * self.limit:
            self._exact[sizes, losses] = found
        return found

    def _new(self, rounded: tuple[tuple[int, ...], ...], row: tuple[Step, ...]) -> int:
        if len(self.rows) >= self.limit:
            same = [n for n, other in enumerate(self.rows) if len(other) == len(row)]
            if same:
                return same[-1]
            if len(self.rows) >= 255:
                raise OverflowError("more than 255 kinds of fidelity ladder on one node")
        self.rows.append(row)
        self._rounded[rounded] = len(self.rows) - 1
        return len(self.rows) - 1
