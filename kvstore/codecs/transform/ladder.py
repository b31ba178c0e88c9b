"""Nested quantizers: how the cells of one pass are cut by the next.

Pass 0 quantizes with step s0: a dead zone |c| < t·s0, then cells of width s0. Pass p has a smaller step and cuts what is there, so
that every pass is a prefix of the next and the cells at the end are those that a single quantizer would have used, but for a few per cent
of their width:

* a value still in the dead zone: |c| < t·s stays there, the rest of the old dead zone becomes one cell on each side;
* a value in a cell of width w: its cell is cut into round(w / s) equal parts;
* a coefficient dropped so far (sigma too small for the step) and now active: quantized afresh.

Rows (coefficients) round w / s at slightly different places, or the rate would jump where all cells of a kind begin to be cut.

The chain rule of entropy makes this lossless but for the cells' widths: FIELD's residual quantizers lose about 5 % of the rate each.
(Successive refinement by cutting cells: Equitz and Cover 1991; embedded dead-zone quantizers as in JPEG 2000.)
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .models import DEAD_ZONE, OCTAVE, PART_EDGES, PART_LOG

#: Largest ratio of two successive steps, in step indices: beyond it the cell cut from the dead zone would be too wide.
MAX_DROP = 2 * OCTAVE
#: Step indices on the wire.
MIN_STEP, MAX_STEP = -2048, 2048
MAX_PASSES = 16
_EDGES = PART_EDGES.tolist()
#: Row r rounds up its number of parts ``DITHER[r mod 4]`` step indices later than round() would.
DITHER = (-7, -2, 2, 7)


def step_size(m: int) -> float:
    """Quantizer step of index `m`."""
    return 2.0 ** (m / OCTAVE)


def step_sizes(steps: np.ndarray) -> np.ndarray:
    """`step_size` of many indices, to the last bit: float64."""
    found, places = np.unique(steps, return_inverse=True)
    return np.array([step_size(m) for m in found.tolist()])[places].reshape(steps.shape)


@lru_cache(maxsize=4096)
def _ring(before: int, m: int) -> tuple[int, float]:
    """Step index of the width of the cell that a pass at `m` cuts from the dead zone of one at `before`, and the width."""
    ring = DEAD_ZONE * (step_size(before) - step_size(m))
    return (round(OCTAVE * math.log2(ring)), ring) if ring > 0 else (0, 0.0)


@dataclass(frozen=True, slots=True)
class Ladder:
    """The cells of a sequence of passes.

    Parameters
    ----------
    steps : int32 [P]
        Step index of each pass, falling by at most `MAX_DROP`.

    For d the row's dither, f the pass in which a coefficient was first active and b ≥ f the one in which a value left the dead zone:

    parts : int32 [D, P, P, P]
        ``parts[d, p, f, b]``: into how many parts pass p cuts such a cell.
    log_width : int32 [D, P + 1, P, P]
        ``log_width[d, p, f, b]``: step index of the cell's width before pass p.
    width : float32 [D, P + 1, P, P]
        The width itself.
    """

    steps: np.ndarray
    parts: np.ndarray
    log_width: np.ndarray
    width: np.ndarray

    @classmethod
    def of(cls, steps: list[int]) -> Ladder:
        """The ladder of the given step indices."""
        n = len(steps)
        parts = np.ones((len(DITHER), n, n, n), dtype=np.int32)
        log_width = np.zeros((len(DITHER), n + 1, n, n), dtype=np.int32)
        width = np.zeros((len(DITHER), n + 1, n, n))
        for p, m in enumerate(steps):
            for f in range(p):
                for b in range(f, p):
                    for d, late in enumerate(DITHER):
                        k = bisect_right(_EDGES, log_width[d, p, f, b] - m - late) + 1
                        parts[d, p, f, b] = k
                        log_width[d, p + 1, f, b] = log_width[d, p, f, b] - PART_LOG[k]
                        width[d, p + 1, f, b] = width[d, p, f, b] / k
                log_width[:, p + 1, f, p], width[:, p + 1, f, p] = _ring(steps[p - 1], m)
            log_width[:, p + 1, p, p] = m
            width[:, p + 1, p, p] = step_size(m)
        return cls(np.array(steps, dtype=np.int32), parts, log_width, width.astype(np.float32))

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """What the kernels take, in their order."""
        return self.steps, self.parts, self.log_width, self.width

    @staticmethod
    def possible(steps: list[int]) -> bool:
        """Whether an encoder can have written these step indices."""
        falling = all(0 < a - b <= MAX_DROP for a, b in zip(steps, steps[1:], strict=False))
        return 1 <= len(steps) <= MAX_PASSES and falling and all(MIN_STEP <= m <= MAX_STEP for m in steps)


@dataclass(frozen=True, slots=True)
class Ladders:
    """The cells of many sequences of passes, for kernels that read them all. Of f, a cell depends on whether it is b.

    Parameters
    ----------
    parts : int32 [K, D, P + 1, P, 2]
        ``parts[k, d, p, b, int(f == b)]``; the rest as in `Ladder`. Where sequence k has no such cell there is no meaning.
    log_width : int32 [K, D, P + 1, P, 2]
    width : float32 [K, D, P + 1, P, 2]
    """

    parts: np.ndarray
    log_width: np.ndarray
    width: np.ndarray

    @classmethod
    def of(cls, steps_KP: np.ndarray, sizes_KP: np.ndarray) -> Ladders:
        """The ladders of int32 step indices and their `step_sizes`; shorter sequences repeat their last one."""
        count, passes = steps_KP.shape
        shape = (count, len(DITHER), passes + 1, passes, 2)
        parts, log_width, width = np.ones(shape, dtype=np.int32), np.zeros(shape, dtype=np.int32), np.zeros(shape)
        late, steps = np.array(DITHER, dtype=np.int32)[:, None, None], steps_KP.tolist()
        for p in range(passes):
            if p:
                before = log_width[:, :, p, :p]
                k = np.searchsorted(PART_EDGES, before - steps_KP[:, p, None, None, None] - late, side="right") + 1
                parts[:, :, p, :p] = k
                log_width[:, :, p + 1, :p] = before - PART_LOG[k]
                width[:, :, p + 1, :p] = width[:, :, p, :p] / k
                rings = np.array([_ring(row[p - 1], row[p]) for row in steps])
                log_width[:, :, p + 1, p, 0], width[:, :, p + 1, p, 0] = rings[:, :1], rings[:, 1:]
            log_width[:, :, p + 1, p, 1] = steps_KP[:, p, None]
            width[:, :, p + 1, p, 1] = sizes_KP[:, p, None]
        return cls(parts, log_width, width.astype(np.float32))
