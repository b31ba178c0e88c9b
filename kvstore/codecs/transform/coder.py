"""One block's coefficients to layers of precision, and back: steps chosen, quantized, entropy-coded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvstore.errors import CorruptBlockError

from ..entropy import rans
from . import kernels
from .ladder import MAX_DROP, MAX_PASSES, MAX_STEP, MIN_STEP, Ladder
from .models import OCTAVE, Models
from .payload import LayerPayload, joined
from .rate import cheapest_within

#: Numbers are int16; no step is chosen that would need larger ones.
_LARGEST_NUMBER = 30_000


@dataclass(slots=True)
class _Group:
    """Coefficients [R, T] of one group of a block, and the cells they are in."""

    c: np.ndarray
    kappa: np.ndarray
    shape: np.ndarray
    kinds: np.ndarray
    lows: np.ndarray


class BlockEncoder:
    """Encodes one block, pass by pass.

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
        self.groups = [
            _Group(c, k, s, np.zeros(c.shape, dtype=np.uint8), np.zeros(c.shape, dtype=np.float32))
            for c, k, s in zip(coefficients, kappa, shape, strict=True)
        ]
        self.steps: list[int] = []
        largest = max((float(np.abs(c).max(initial=0.0)) for c in coefficients), default=0.0)
        self.finest = max(MIN_STEP, math.ceil(OCTAVE * math.log2(max(largest, 1e-30) / _LARGEST_NUMBER)))

    @property
    def tokens(self) -> int:
        return self.groups[0].c.shape[1]

    def price(self, m: int) -> float:
        """Bytes that a further pass at step index `m` would take."""
        ladder, p = Ladder.of([*self.steps, m]), len(self.steps)
        book, zero = self.models.book, self.models.zero
        tables = (zero, book.cost, book.first, book.shift, book.escape)
        bits = sum(kernels.price(g.c, g.kinds, g.lows, g.kappa, g.shape, p, *ladder.arrays, *tables) for g in self.groups)
        return bits / 8 + len(self.groups) * (2 * rans.STATE_WORDS + 4) + 2

    def layer_within(self, budget: float, guess: int) -> LayerPayload:
        """The next layer of precision, as fine as `budget` bytes allow."""
        left, steps, words = budget - 2, [], [[] for _ in self.groups]
        while True:
            high = self.steps[-1] - 1 if self.steps else MAX_STEP
            low = max(self.steps[-1] - MAX_DROP if self.steps else MIN_STEP, min(self.finest, high))
            m = cheapest_within(self.price, left, guess, low, high)
            left -= self._pass(m, steps, words)
            if m > low or m <= self.finest or len(self.steps) >= MAX_PASSES - 4:
                return LayerPayload(steps, words)

    def layer_at(self, m: int) -> LayerPayload:
        """The next layer of precision, ending at step index `m`."""
        steps, words = [], [[] for _ in self.groups]
        while self.steps and self.steps[-1] - m > MAX_DROP:
            self._pass(self.steps[-1] - MAX_DROP, steps, words)
        self._pass(m, steps, words)
        return LayerPayload(steps, words)

    def _pass(self, m: int, steps: list[int], words: list[list[np.ndarray]]) -> int:
        """Encode one pass, append it to `steps` and `words`; its bytes."""
        self.steps.append(m)
        ladder, p = Ladder.of(self.steps), len(self.steps) - 1
        size = 2
        for g, streams in zip(self.groups, words, strict=True):
            stream = self._stream(g, p, ladder)
            streams.append(stream)
            size += 2 * len(stream) + 4
        steps.append(m)
        return size

    def _stream(self, g: _Group, p: int, ladder: Ladder) -> np.ndarray:
        count = kernels.active(g.kappa, ladder.steps[p])
        numbers = np.empty((count, self.tokens), dtype=np.int16)
        kernels.quantize(g.c, g.kinds, g.lows, g.kappa, p, ladder.steps, ladder.parts, ladder.width, numbers)
        tables = kernels.tables_of(g.kappa, g.shape, count, p, ladder.steps, ladder.parts, ladder.log_width, self.models.zero)
        out = np.empty(rans.max_words(numbers.size), dtype=np.uint16)
        begin = rans.encode(numbers, g.kinds[:count], tables, out, *self.models.book.arrays)
        kernels.advance(numbers, g.kinds, g.lows, g.kappa, p, ladder.steps, ladder.parts, ladder.width)
        return out[begin:].copy()

    def errors(self) -> list[np.ndarray]:
        """Coefficients minus what a decoder of all passes so far rebuilds, float32 [R, T] of each group."""
        ladder, out = Ladder.of(self.steps), []
        for g in self.groups:
            rebuilt = np.empty_like(g.c)
            cells = (g.kinds, g.lows, g.kappa, g.shape, len(self.steps), ladder.steps, ladder.width, ladder.log_width)
            kernels.rebuild(*cells, self.models.centre, rebuilt)
            out.append(g.c - rebuilt)
        return out


@dataclass(frozen=True, slots=True)
class BlockDecoder:
    """Decodes one block, group by group.

    Parameters
    ----------
    tokens : int
        Coded tokens: without the exact first one.
    ladder, words
        From `payload.joined`.
    """

    models: Models
    tokens: int
    ladder: Ladder
    words: list[tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, models: Models, tokens: int, layers: Sequence[LayerPayload]) -> BlockDecoder:
        """Decoder of parsed layers. Raises CorruptBlockError for steps that no encoder writes."""
        return cls(models, tokens, *joined(layers))

    def active(self, kappa: np.ndarray) -> int:
        """How many of a group's coefficients are not dropped."""
        return int(kernels.active(kappa, self.ladder.steps[-1]))

    def group(self, index: int, kappa: np.ndarray, shape: np.ndarray, out_RT: np.ndarray) -> None:
        """Coefficients of group `index` into `out_RT` [at least those active, tokens], float32.

        Raises
        ------
        CorruptBlockError
            For streams that no encoder writes.
        """
        (words, ends), ladder, models = self.words[index], self.ladder, self.models
        shape_RT = self.active(kappa), self.tokens
        kinds = np.zeros(shape_RT, dtype=np.uint8)
        lows = np.zeros(shape_RT, dtype=np.float32)
        numbers = np.empty(shape_RT, dtype=np.int16)
        for p, m in enumerate(ladder.steps):
            now = kernels.active(kappa, m)
            tables = kernels.tables_of(kappa, shape, now, p, ladder.steps, ladder.parts, ladder.log_width, models.zero)
            if not rans.decode(words[ends[p] : ends[p + 1]], kinds[:now], tables, numbers[:now], *models.book.arrays):
                raise CorruptBlockError(f"the entropy-coded streams of group {index} are damaged")
            kernels.advance(numbers[:now], kinds, lows, kappa, p, ladder.steps, ladder.parts, ladder.width)
        cells = (kinds, lows, kappa, shape, len(ladder.steps), ladder.steps, ladder.width, ladder.log_width)
        kernels.rebuild(*cells, models.centre, out_RT)
