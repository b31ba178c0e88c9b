"""One block's coefficients to layers of precision, and back: steps chosen, quantized, entropy-coded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvstore.errors import CorruptBlockError

from ..entropy import rans
from . import kernels
from .classes import TokenClasses
from .ladder import DITHER, MAX_DROP, MAX_PASSES, MAX_STEP, MIN_STEP, Ladder
from .models import LAW, OCTAVE, Models
from .payload import LayerPayload, parts_of
from .rate import cheapest_within
from .rows import add_rare

#: Numbers are int16; no step is chosen that would need larger ones.
_LARGEST_NUMBER = 30_000
#: Blocks of at least this many tokens are priced by every second coefficient: a third of a per cent off, half of the time.
_SAMPLED = 32


@dataclass(slots=True)
class _Group:
    """One block's coefficients of one group, and the cells they are in. Letters and arrays as in `kernels`."""

    c: np.ndarray
    kappa: np.ndarray
    shape: np.ndarray
    kinds: np.ndarray
    lows: np.ndarray
    loud: np.ndarray
    peaks: np.ndarray
    energies: np.ndarray

    @classmethod
    def of(cls, c: np.ndarray, kappa: np.ndarray, shape: np.ndarray) -> _Group:
        rows = len(c)
        cells = np.zeros(c.shape, dtype=np.uint8), np.zeros(c.shape, dtype=np.float32), np.zeros(rows, dtype=np.uint8)
        return cls(c, kappa, shape, *cells, np.empty(rows, dtype=np.float32), np.empty(rows, dtype=np.float32))


class _ClassEncoder:
    """Encodes the tokens of one class of a block, pass by pass.

    Parameters
    ----------
    models : Models
    kappa, shape : int32 [R] of each group
    coefficients : float32 [R, T] of each group, C-contiguous
    """

    def __init__(
        self, models: Models, kappa: Sequence[np.ndarray], shape: Sequence[np.ndarray], coefficients: Sequence[np.ndarray]
    ) -> None:
        self.models = models
        self.groups = [_Group.of(*each) for each in zip(coefficients, kappa, shape, strict=True)]
        self.steps: list[int] = []
        largest = max(float(kernels.measure(g.c, g.peaks, g.energies)) for g in self.groups)
        self.finest = max(MIN_STEP, math.ceil(OCTAVE * math.log2(max(largest, 1e-30) / _LARGEST_NUMBER)))

    @property
    def tokens(self) -> int:
        return self.groups[0].c.shape[1]

    def price(self, m: int, every: int) -> float:
        """Bytes that a further pass at step index `m` would take, from every `every`-th coefficient."""
        ladder, p = Ladder.of([*self.steps, m]), len(self.steps)
        book, zero = self.models.book, self.models.zero
        tables = (zero, book.cost, book.first, book.shift, book.escape, LAW)
        bits = sum(
            kernels.price(g.c, g.kinds, g.lows, g.loud, g.peaks, g.kappa, g.shape, p, *ladder.arrays, *tables, every)
            for g in self.groups
        )
        return bits / 8 + len(self.groups) * (2 * rans.STATE_WORDS + 4)

    def encode_pass(self, m: int) -> list[np.ndarray]:
        """The stream of each group at step index `m`."""
        self.steps.append(m)
        ladder, p = Ladder.of(self.steps), len(self.steps) - 1
        return [self._stream(g, p, ladder) for g in self.groups]

    def _stream(self, g: _Group, p: int, ladder: Ladder) -> np.ndarray:
        steps, parts, log_width, width = ladder.arrays
        count = kernels.active(g.kappa, steps[p], LAW)
        numbers = np.empty((count, self.tokens), dtype=np.int16)
        kernels.quantize(g.c, g.kinds, g.lows, g.loud, g.peaks, g.kappa, p, steps, parts, width, LAW, numbers)
        tables = kernels.tables_of(g.kappa, g.shape, count, p, steps, parts, log_width, self.models.zero, LAW)
        out = np.empty(rans.max_words(numbers.size), dtype=np.uint16)
        begin = rans.encode(numbers, g.kinds[:count], tables, out, *self.models.book.arrays)
        kernels.advance(numbers, g.kinds, g.lows, g.loud, g.kappa, p, steps, parts, width, LAW)
        return out[begin:].copy()

    def lost(self, sketches: Sequence[np.ndarray], seen: Sequence[np.ndarray]) -> float:
        """As `BlockEncoder.lost`, for this class's tokens."""
        ladder = Ladder.of(self.steps)
        place = (len(self.steps), ladder.steps, ladder.width, ladder.log_width, self.models.centre, LAW)
        return sum(
            kernels.residue(g.c, g.kinds, g.lows, g.loud, g.energies, g.kappa, g.shape, *place, sketch, z)
            for g, sketch, z in zip(self.groups, sketches, seen, strict=True)
        )


class BlockEncoder:
    """Encodes one block, pass by pass.

    Parameters
    ----------
    models : Models
    kappa, shape : int32 [R] of each group
    coefficients : float32 [R, T] of each group
        Tokens in the order of `classes`.
    classes : TokenClasses
    """

    def __init__(
        self, models: Models, kappa: Sequence[np.ndarray], shape: Sequence[np.ndarray], coefficients: Sequence[np.ndarray],
        classes: TokenClasses,
    ) -> None:
        self._given = models, kappa, shape, coefficients, classes
        self.classes, self.runs, self.steps = classes, classes.runs, []
        self.parts = [
            _ClassEncoder(models, kappa, shape, [np.ascontiguousarray(c[:, first:end]) for c in coefficients])
            for _, first, end in self.runs
        ]
        self.finest = max(part.finest - offset for part, (offset, _, _) in zip(self.parts, self.runs, strict=True))
        self._streams = len(coefficients) * len(self.parts)

    def again(self) -> BlockEncoder:
        """An encoder of the same block before its first pass."""
        return BlockEncoder(*self._given)

    @property
    def tokens(self) -> int:
        return len(self.classes.of)

    def price(self, m: int) -> float:
        """Bytes that a further pass at step index `m` would take."""
        every = 2 if self.tokens >= _SAMPLED else 1
        return 2 + sum(part.price(m + offset, every) for part, (offset, _, _) in zip(self.parts, self.runs, strict=True))

    def layer_within(self, budget: float, guess: int) -> LayerPayload:
        """The next layer of precision, as fine as `budget` bytes allow."""
        left, steps, words = budget - 2, [], [[] for _ in range(self._streams)]
        while True:
            high = self.steps[-1] - 1 if self.steps else MAX_STEP
            low = max(self.steps[-1] - MAX_DROP if self.steps else MIN_STEP, min(self.finest, high))
            m = cheapest_within(self.price, left, guess, low, high)
            left -= self._pass(m, steps, words)
            if m > low or m <= self.finest or len(self.steps) >= MAX_PASSES - 4:
                return LayerPayload.of(steps, words)

    def layer_at(self, m: int) -> LayerPayload:
        """The next layer of precision, ending at step index `m`."""
        steps, words = [], [[] for _ in range(self._streams)]
        while self.steps and self.steps[-1] - m > MAX_DROP:
            self._pass(self.steps[-1] - MAX_DROP, steps, words)
        self._pass(m, steps, words)
        return LayerPayload.of(steps, words)

    def _pass(self, m: int, steps: list[int], words: list[list[np.ndarray]]) -> int:
        """Encode one pass, append it to `steps` and `words`; its bytes."""
        self.steps.append(m)
        steps.append(m)
        size = 2
        for number, (part, (offset, _, _)) in enumerate(zip(self.parts, self.runs, strict=True)):
            for stream, streams in zip(part.encode_pass(m + offset), words[number :: len(self.parts)], strict=True):
                streams.append(stream)
                size += 2 * len(stream) + 4
        return size

    def lost(self, sketches: Sequence[np.ndarray], seen: Sequence[np.ndarray]) -> float:
        """Sum of squared errors of all coefficients, against what a decoder of all passes so far rebuilds.

        An error counts in units of its class's step, as much as it harms. Takes what is rebuilt times `sketches` (float32 [R, S] of
        each group) from `seen` (float32 [tokens, S] of each group).
        """
        total = 0.0
        for part, (offset, first, end) in zip(self.parts, self.runs, strict=True):
            total += part.lost(sketches, [z[first:end] for z in seen]) * 4.0 ** (-offset / OCTAVE)
        return total


@dataclass(frozen=True, slots=True)
class _ClassDecoder:
    """Decodes the tokens of one class of a block, group by group; ladder and words as in `payload.Part`."""

    models: Models
    tokens: int
    ladder: Ladder
    words: list[tuple[np.ndarray, np.ndarray]]

    def active(self, kappa: np.ndarray) -> int:
        """How many of a group's coefficients are coded at all."""
        return kernels.active(kappa, self.ladder.steps[-1], LAW)

    def busy(self, kappa: np.ndarray, shape: np.ndarray) -> np.ndarray:
        """In how many of these tokens each coded coefficient differs from 0, as calibration found them: float64 [active]."""
        above = kappa[: self.active(kappa)] - self.ladder.steps[-1] - LAW.active
        return self.tokens * (1 - self.models.zero[shape[: len(above)], np.minimum(above, LAW.span - 1)] / 65535)

    def group(
        self, index: int, kappa: np.ndarray, shape: np.ndarray, common: np.ndarray, rare: np.ndarray, begin: int, first_begin: int
    ) -> None:
        """Decode the coefficients of group `index` into columns of `common` from `first_begin` on, and of `rare` from `begin` on."""
        (words, ends), ladder, models = self.words[index], self.ladder, self.models
        count, first = self.active(kappa), len(common)
        kinds, loud = np.zeros((count, self.tokens), dtype=np.uint8), np.zeros(count, dtype=np.uint8)
        lows = np.zeros((count, self.tokens), dtype=np.float32)
        numbers = np.empty((count, self.tokens), dtype=np.int16)
        for p, m in enumerate(ladder.steps):
            now = kernels.active(kappa, m, LAW)
            tables = kernels.tables_of(kappa, shape, now, p, ladder.steps, ladder.parts, ladder.log_width, models.zero, LAW)
            if not rans.decode(words[ends[p] : ends[p + 1]], kinds[:now], tables, numbers[:now], *models.book.arrays):
                raise CorruptBlockError(f"the entropy-coded streams of group {index} are damaged")
            kernels.advance(numbers[:now], kinds, lows, loud, kappa, p, ladder.steps, ladder.parts, ladder.width, LAW)
        place = (len(ladder.steps), ladder.steps, ladder.width, ladder.log_width, models.centre, LAW)
        kernels.rebuild(kinds, lows, loud, kappa, shape, *place, common, first_begin)
        kernels.rebuild(kinds[first:], lows[first:], loud[first:], kappa[first:], shape[first:], *place, rare, begin)


@dataclass(frozen=True, slots=True)
class BlockDecoder:
    """Decodes one block, group by group.

    Parameters
    ----------
    tokens : int
        Coded tokens: without the exact first one.
    parts : list of (first token, decoder) of each class
    """

    tokens: int
    parts: list[tuple[int, _ClassDecoder]]

    @classmethod
    def of(cls, models: Models, tokens: int, layers: Sequence[LayerPayload]) -> BlockDecoder:
        """Decoder of parsed layers. Raises CorruptBlockError for steps that no encoder writes."""
        return cls(tokens, [(p.first, _ClassDecoder(models, p.tokens, p.ladder, p.words)) for p in parts_of(layers, tokens)])

    def common(self, kappa: np.ndarray, shape: np.ndarray, share: float) -> int:
        """How many of a group's leading coefficients differ from 0 in at least `share` of all tokens, as calibration found them."""
        busy = np.zeros(len(kappa))
        for _, part in self.parts:
            each = part.busy(kappa, shape)
            busy[: len(each)] += each
        rows = int(np.count_nonzero(busy >= max(share * self.tokens, 1e-9)))
        return min(-(-rows // len(DITHER)) * len(DITHER), len(kappa))

    def group(
        self, index: int, kappa: np.ndarray, shape: np.ndarray, first: int, common: np.ndarray, begin: int, rows: np.ndarray,
        basis: np.ndarray,
    ) -> None:
        """Decode the coefficients of group `index`, tokens in the order of coding.

        Parameters
        ----------
        kappa, shape : int32 [R]
        first : int
            How many coefficients are `common`.
        common : float32 [at least `first`, columns]
            Takes those, from column `begin` on, and zeros below them.
        rows : float32 [tokens, C]
            The other coefficients times their rows of `basis` [R, C] are added to it.

        Raises
        ------
        CorruptBlockError
            For streams that no encoder writes.
        """
        most = max(part.active(kappa) for _, part in self.parts)
        rare = np.empty((max(most - first, 0), self.tokens), dtype=np.float32)
        common[first:, begin : begin + self.tokens] = 0
        for at, part in self.parts:
            part.group(index, kappa, shape, common[:first], rare, at, begin + at)
        if len(rare):
            add_rare(rare, rows, first, basis)
