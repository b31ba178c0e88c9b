"""Static models of the coefficients: which table codes a number, and where in its cell a value is rebuilt.

A coefficient i is described by its standard deviation, kept as the whole number ``kappa = round(32·log2(sigma))``, and by one of a few
*shapes* (how heavy its tails are), both measured by calibration on texts that the basis was not fitted to. A quantizer step is a whole
number too, ``step = 2^(m/32)``, so everything that picks a table is integer arithmetic on ``kappa - m``, alike on every machine.

Three families of tables make up the book:

* *fresh*, by shape and by quarter octaves of sigma/step: the whole number of a coefficient that is coded for the first time;
* *split zero*, by the probability of staying zero: -1, 0 or +1 when the dead zone is refined;
* *split cell*, by number of parts and by slope: which of 2 … 5 equal parts of its cell a value lies in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..entropy.book import MAX_SYMBOLS, Book, frequencies

#: Step indices an octave.
OCTAVE = 32
#: Half the width of the dead zone, in steps. Above ½: rare small values are not worth their bits.
DEAD_ZONE = 0.58
#: Coefficients whose sigma is below 0.12 steps are dropped.
ACTIVE = round(OCTAVE * math.log2(0.12))
#: Step indices of one class of fresh tables.
CLASS_STEPS = OCTAVE // 4
#: Fresh classes reach from `ACTIVE` up to sigma = 2^11 steps.
CLASSES = (11 * OCTAVE - ACTIVE) // CLASS_STEPS + 1
#: Length of tables over ``kappa - m - ACTIVE``.
SPAN = CLASSES * CLASS_STEPS
#: Tables of split zeros: one for each 64th of probability.
ZERO_TABLES = 64
MAX_PARTS = 5
#: ``w - m`` from which a cell of width 2^(w/32) is split in 2, 3, 4, 5 at step m: round(width / step) in integers.
PART_EDGES = np.array([round(OCTAVE * math.log2(p - 0.5)) for p in range(2, MAX_PARTS + 1)], dtype=np.int32)
#: Step indices by which a cell narrows when it is split in 0 … 5.
PART_LOG = np.array([0, 0] + [round(OCTAVE * math.log2(p)) for p in range(2, MAX_PARTS + 1)], dtype=np.int32)
#: Slopes of split cells: quarter octaves of part width / sigma, from 2^-4 up.
SLOPES = 28
SLOPE_LOW = -4 * OCTAVE


class Law(NamedTuple):
    """The numbers above as the kernels take them: an argument, because numba's cache would not notice a changed constant."""

    active: int
    class_steps: int
    classes: int
    dead: np.float32
    octave: int
    part_log: np.ndarray
    slope_low: int
    slopes: int
    span: int
    zero_tables: int


LAW = Law(ACTIVE, CLASS_STEPS, CLASSES, np.float32(DEAD_ZONE), OCTAVE, PART_LOG, SLOPE_LOW, SLOPES, SPAN, ZERO_TABLES)


@dataclass(frozen=True, slots=True)
class Models:
    """The book, and what finds a table in it.

    Parameters
    ----------
    book : Book
        Fresh tables [shapes · CLASSES], then split zeros, then split cells [parts - 2, SLOPES].
    zero : uint16 [shapes, SPAN]
        Probability · 65535 that a coefficient lies in the dead zone, by ``kappa - m - ACTIVE``.
    centre : float32 [shapes, 3, SPAN]
        Where in its cell a value is rebuilt (0 … 1): in the first fresh cell, in later ones, in a cell split from the dead zone.
    """

    book: Book
    zero: np.ndarray
    centre: np.ndarray

    @property
    def shapes(self) -> int:
        return len(self.zero)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """What the kernels take, in their order."""
        return self.zero, self.centre, self.book.cost, *self.book.arrays


def fit(samples: list[np.ndarray]) -> Models:
    """Models from the standardized magnitudes |c|/sigma of each shape's coefficients (1-d arrays, pooled).

    Raises
    ------
    ValueError
        For a shape without samples.
    """
    distributions = [_Distribution(z) for z in samples]
    rows, first, shift, escape = [], [], [], []
    for d in distributions:
        for k in range(CLASSES):
            row, low, bits, esc = _fresh(d, 2.0 ** ((ACTIVE + (k + 0.5) * CLASS_STEPS) / OCTAVE))
            rows.append(row), first.append(low), shift.append(bits), escape.append(esc)
    for k in range(ZERO_TABLES):
        stay = (k + 0.5) / ZERO_TABLES
        rows.append(_padded([(1 - stay) / 2, stay, (1 - stay) / 2])), first.append(-1), shift.append(0), escape.append(-1)
    for parts in range(2, MAX_PARTS + 1):
        for k in range(SLOPES):
            decay = math.sqrt(2) * 2.0 ** ((SLOPE_LOW + (k + 0.5) * CLASS_STEPS) / OCTAVE)
            rows.append(_padded([max(math.exp(-decay * i), 1e-3) for i in range(parts)]))
            first.append(0), shift.append(0), escape.append(-1)
    book = Book(np.stack(rows), np.array(first), np.array(shift), np.array(escape))
    u = 2.0 ** ((ACTIVE + np.arange(SPAN)) / OCTAVE)
    zero = np.stack([np.round(d.below(DEAD_ZONE / u) * 65535) for d in distributions]).astype(np.uint16)
    cells = [(DEAD_ZONE / u, 1 / u), ((1 + DEAD_ZONE) / u, 1 / u), (DEAD_ZONE / u, 1.1 / u)]
    centre = np.stack([[d.centre(low, width) for low, width in cells] for d in distributions])
    return Models(book, np.maximum(zero, 1), centre.astype(np.float32))


class _Distribution:
    """An empirical distribution of magnitudes, with an exponential tail beyond its samples."""

    def __init__(self, z: np.ndarray) -> None:
        if not len(z):
            raise ValueError("a shape needs samples")
        self.z = np.sort(np.abs(z).astype(np.float64))
        self.sums = np.concatenate([[0.0], self.z.cumsum()])

    def below(self, edge: np.ndarray) -> np.ndarray:
        """P(|c| < edge · sigma), kept away from 0 and 1."""
        n = len(self.z)
        inside = (np.searchsorted(self.z, edge) + 0.5) / (n + 1)
        return np.clip(inside, np.minimum(edge * 0.5, 0.5), 1 - np.exp(-1.5 * edge) * min(1e-2, 10 / n))

    def centre(self, low: np.ndarray, width: np.ndarray) -> np.ndarray:
        """Mean position within [low, low + width), as a share of the width; the exponential's where samples are few."""
        a, b = np.searchsorted(self.z, low), np.searchsorted(self.z, low + width)
        count = b - a
        decay = np.clip(math.sqrt(2) * width, 1e-3, 40)
        prior = 1 / decay - 1 / np.expm1(decay)
        mean = (self.sums[b] - self.sums[a] - count * low) / width
        return np.clip((mean + 30 * prior) / (count + 30), 0.02, 0.6)


def _fresh(d: _Distribution, u: float) -> tuple[np.ndarray, int, int, int]:
    """Frequencies, first number, shift and escape symbol of a coefficient with sigma = `u` steps."""
    reach = MAX_SYMBOLS // 2 - 1
    bits = max(0, math.ceil(math.log2(4.5 * u / reach)))
    limit = max(1, min(reach, math.ceil(8 * u + 1))) if not bits else reach
    numbers = np.arange(-limit, limit + 1) << bits
    edges = np.arange(0, (limit + 1) << bits) + DEAD_ZONE
    below = np.concatenate([[0.0], d.below(edges / u)])
    single = np.diff(below) / 2
    single[0] *= 2
    covered = numbers[:, None] + np.arange(1 << bits)
    probability = np.where(abs(covered) < len(single), single[np.minimum(abs(covered), len(single) - 1)], 0.0).sum(1)
    outside = max(1.0 - probability.sum(), 0.0)
    keep = probability * 4096 >= 0.5
    outside += probability[~keep].sum()
    probability = np.where(keep, probability, 0.0)
    return _padded([*probability, max(outside, 1e-4)]), int(numbers[0]), bits, len(numbers)


def _padded(probability: list[float]) -> np.ndarray:
    row = np.zeros(MAX_SYMBOLS, dtype=np.uint16)
    row[: len(probability)] = frequencies(np.array(probability))
    return row
