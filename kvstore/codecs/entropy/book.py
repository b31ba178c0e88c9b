"""The static models of the entropy coder: a book of small frequency tables, shared by encoder and decoder.

A *symbol* of a table stands for a range of whole numbers, ``base … base + 2^bits - 1``; the position within the range follows as
`bits` equiprobable bits. So one table serves a narrow distribution (each symbol one number), a wide one (each symbol a run of
numbers), and an escape (one symbol that covers all of int16).

Frequencies are integers that sum to 2^12. They travel inside the profile, never recomputed by a decoder: a logarithm that differs in
its last digit between two machines would garble every block.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from kvstore.errors import InvalidInputError

from .rans import ESCAPE_BASE, PROBABILITY_BITS

TOTAL = 1 << PROBABILITY_BITS
#: Symbols of the largest table.
MAX_SYMBOLS = 64
#: The escape symbol covers int16 with this many plain bits.
ESCAPE_BITS = 16


@dataclass(frozen=True, slots=True)
class Book:
    """Frequency tables, and what both directions of the coder look up in them.

    Parameters
    ----------
    freq : uint16 [tables, MAX_SYMBOLS]
        Frequency of each symbol, 0 for symbols that the table lacks; each row sums to 4096.
    first : int16 [tables]
        Smallest number that symbol 0 covers.
    shift : uint8 [tables]
        log2 of how many numbers each ordinary symbol covers.
    escape : int16 [tables]
        Which symbol escapes; -1 for a table without escape.

    Raises
    ------
    InvalidInputError
        For tables that no coder could use.
    """

    freq: np.ndarray
    first: np.ndarray
    shift: np.ndarray
    escape: np.ndarray
    #: uint16 [tables, MAX_SYMBOLS]: sum of the frequencies before each symbol.
    start: np.ndarray = field(init=False)
    #: uint8 [tables, 4096]: symbol of each slot.
    slots: np.ndarray = field(init=False)
    #: uint64 [tables, MAX_SYMBOLS]: all that a coder needs of a symbol in one word: frequency, start, the first number that it covers
    #: (16 bits each) and its plain bits; 0 for symbols that the table lacks.
    entries: np.ndarray = field(init=False)
    #: float32 [tables, MAX_SYMBOLS]: bits that a symbol costs, its plain bits included; infinite for symbols that the table lacks.
    cost: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        freq = np.ascontiguousarray(self.freq, dtype=np.uint16)
        tables = len(freq)
        shapes_fit = freq.shape == (tables, MAX_SYMBOLS) and all(len(a) == tables for a in (self.first, self.shift, self.escape))
        if not tables or not shapes_fit or (freq.astype(np.int64).sum(1) != TOTAL).any():
            raise InvalidInputError("the entropy coder's tables are malformed: each must hold frequencies that sum to 4096")
        if (self.shift > 12).any() or (self.escape >= MAX_SYMBOLS).any() or (self.escape < -1).any():
            raise InvalidInputError("the entropy coder's tables name an impossible shift or escape symbol")
        end = freq.astype(np.int64).cumsum(1)
        slots = np.stack([np.repeat(np.arange(MAX_SYMBOLS, dtype=np.uint8), row) for row in freq])
        bits = np.where(np.arange(MAX_SYMBOLS) == self.escape[:, None], ESCAPE_BITS, self.shift[:, None])
        with np.errstate(divide="ignore"):
            cost = (PROBABILITY_BITS - np.log2(freq.astype(np.float64)) + bits).astype(np.float32)
        start = (end - freq).astype(np.uint16)
        values = {"freq": freq, "start": start, "slots": slots, "cost": cost, "entries": self._entries(freq, start, bits)}
        for name, value in values.items():
            object.__setattr__(self, name, value)
        for name, dtype in (("first", np.int16), ("shift", np.uint8), ("escape", np.int16)):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype=dtype))

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """What the CPU's kernels take, in their order."""
        return self.entries, self.slots, self.first, self.shift, self.escape

    def _entries(self, freq: np.ndarray, start: np.ndarray, bits: np.ndarray) -> np.ndarray:
        symbols = np.arange(MAX_SYMBOLS)
        numbers = np.asarray(self.first, np.int64)[:, None] + (symbols << np.asarray(self.shift, np.int64)[:, None])
        numbers = np.where(symbols == np.asarray(self.escape)[:, None], ESCAPE_BASE, numbers)
        fields = (freq, start, numbers & 0xFFFF, bits)
        packed = sum(np.asarray(f, np.int64).astype(np.uint64) << np.uint64(16 * i) for i, f in enumerate(fields))
        return np.where(freq > 0, packed, np.uint64(0))


def frequencies(probability: np.ndarray) -> np.ndarray:
    """Integer frequencies that sum to 4096, near-optimal for `probability` [symbols].

    A symbol of positive probability gets at least 1. Deterministic; only calibration calls it.
    """
    p = np.asarray(probability, dtype=np.float64)
    p = p / p.sum()
    freq = np.where(p > 0, np.maximum(1, np.round(p * TOTAL)), 0).astype(np.int64)
    while (excess := int(freq.sum()) - TOTAL) != 0:
        step = -1 if excess > 0 else 1
        # The symbol whose change costs the fewest expected bits.
        loss = np.where(freq + step > 0, -p * step / np.maximum(freq, 1), np.inf)
        loss[freq == 0] = np.inf
        freq[np.argmin(loss)] += step
    return freq.astype(np.uint16)
