"""The bytes of one layer of precision.

Little-endian::

    flags u8 | passes u8 | step index i16 a pass
    classes of the tokens, 4 bits each (flag 4; base layer only, see `classes`)
    words u32 of each stream: group by group, class by class within a group, pass by pass within a class
    the first token of a sequence, 16 bits a value (flag 1; K [L, H, D] after RoPE, then V; bfloat16 with flag 2, else float16)
    the streams, in that order: 16-bit words

Passes are numbered through from the base layer. With the lengths in front, a group's streams can be fetched and decoded alone.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvstore.errors import CorruptBlockError

from .classes import TokenClasses, packed_bytes
from .ladder import MAX_PASSES, Ladder

EXACT, BFLOAT16, CLASSED = 1, 2, 4


@dataclass(frozen=True, slots=True)
class LayerPayload:
    """One layer of precision, parsed but not decoded.

    Parameters
    ----------
    steps : list of int
        Step index of each of its passes.
    words : uint16 [all streams' words]
        Group by group, class by class within a group, pass by pass within a class.
    ends : int64 [streams + 1]
        Where each stream begins in `words`, and where the last one ends.
    exact : bytes
        The first token's values, empty where there is none.
    bfloat16 : bool
        Their type.
    """

    steps: list[int]
    words: np.ndarray
    ends: np.ndarray
    exact: bytes = b""
    bfloat16: bool = False
    classes: TokenClasses | None = None

    @classmethod
    def of(cls, steps: list[int], words: Sequence[Sequence[np.ndarray]]) -> LayerPayload:
        """From the streams of each group's classes, a list of passes each."""
        streams = [stream for passes in words for stream in passes]
        return cls(steps, np.concatenate(streams), np.cumsum([0, *(len(s) for s in streams)]))

    @property
    def runs(self) -> int:
        """Classes of all groups: each has a stream a pass."""
        return (len(self.ends) - 1) // len(self.steps)

    def run(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Words of one class of one group, and the number of words of each of its passes."""
        ends = self.ends[number * len(self.steps) : (number + 1) * len(self.steps) + 1]
        return self.words[ends[0] : ends[-1]], np.diff(ends)

    def to_bytes(self) -> bytes:
        flags = (EXACT if self.exact else 0) | (BFLOAT16 if self.bfloat16 else 0) | (CLASSED if self.classes else 0)
        head = struct.pack(f"<BB{len(self.steps)}h", flags, len(self.steps), *self.steps)
        classes = self.classes.to_bytes() if self.classes else b""
        return b"".join([head, classes, np.diff(self.ends).astype("<u4").tobytes(), self.exact, self.words.astype("<u2").tobytes()])

    @classmethod
    def from_bytes(cls, data: memoryview, runs: int, exact_bytes: int = 0, tokens: int = 0) -> LayerPayload:
        """Parse untrusted bytes; allocates no more than they hold.

        Parameters
        ----------
        runs : int
            The groups of the profile, times the classes in the base layer for any other layer.
        exact_bytes : int
            Bytes of an exact first token here, 0 where there must be none.
        tokens : int
            Coded tokens, for the base layer, which may divide them into classes; 0 where there must be none.

        Raises
        ------
        CorruptBlockError
        """
        if len(data) < 2:
            raise CorruptBlockError("a layer of precision has fewer bytes than its head")
        flags, passes = data[0], data[1]
        if not 1 <= passes <= MAX_PASSES or not _possible(flags, bool(exact_bytes), tokens):
            raise CorruptBlockError(f"a layer of precision claims {passes} passes and flags {flags:#x}")
        at, classes = 2 + 2 * passes, None
        if flags & CLASSED:
            at += packed_bytes(tokens)
            classes = TokenClasses.from_bytes(bytes(data[at - packed_bytes(tokens) : at]), tokens)
            runs *= len(classes.runs)
        begin = at + 4 * runs * passes + exact_bytes
        if len(data) < begin:
            raise CorruptBlockError("a layer of precision is shorter than its head says")
        ends = np.zeros(runs * passes + 1, dtype=np.int64)
        np.cumsum(np.frombuffer(data, "<u4", runs * passes, at), out=ends[1:])
        if len(data) != begin + 2 * int(ends[-1]):
            raise CorruptBlockError("the streams of a layer of precision do not fill it")
        words, exact = np.frombuffer(data[begin:], dtype="<u2"), bytes(data[begin - exact_bytes : begin])
        return cls(list(struct.unpack_from(f"<{passes}h", data, 2)), words, ends, exact, bool(flags & BFLOAT16), classes)


def _possible(flags: int, exact: bool, tokens: int) -> bool:
    """Whether `to_bytes` writes these flags in such a layer."""
    bfloat16_alone = flags & BFLOAT16 and not flags & EXACT
    return flags < 8 and bool(flags & EXACT) == exact and not bfloat16_alone and (tokens > 0 or not flags & CLASSED)


@dataclass(frozen=True, slots=True)
class Part:
    """The tokens of one class, which are coded apart from the others.

    Parameters
    ----------
    first, tokens : int
        The first of them among the coded tokens, and their number.
    ladder : Ladder
    words : list (groups) of (uint16 words of all passes, int64 end of each pass)
    """

    first: int
    tokens: int
    ladder: Ladder
    words: list[tuple[np.ndarray, np.ndarray]]


def parts_of(layers: Sequence[LayerPayload], tokens: int) -> list[Part]:
    """The classes of a block of `tokens` coded tokens, in the order of coding. Raises CorruptBlockError as `joined` does."""
    steps, words = joined(layers)
    runs = (layers[0].classes or TokenClasses.alike(tokens)).runs
    return [
        Part(first, end - first, Ladder.of([m + offset for m in steps]), words[number :: len(runs)])
        for number, (offset, first, end) in enumerate(runs)
    ]


def joined(layers: Sequence[LayerPayload]) -> tuple[list[int], list[tuple[np.ndarray, np.ndarray]]]:
    """The step indices of all layers together, and for each stream its words of all passes with the ends of each.

    Raises
    ------
    CorruptBlockError
        For steps that no encoder writes.
    """
    steps, out = joined_steps(layers), []
    for number in range(layers[0].runs):
        words, sizes = zip(*(layer.run(number) for layer in layers), strict=True)
        ends = np.cumsum(np.concatenate([[0], *sizes]))
        out.append((np.concatenate(words).astype(np.uint16), ends.astype(np.int64)))
    return steps, out


def joined_steps(layers: Sequence[LayerPayload]) -> list[int]:
    """The step indices of all layers together. Raises CorruptBlockError for some that no encoder writes."""
    steps = [m for layer in layers for m in layer.steps]
    if not Ladder.possible(steps):
        raise CorruptBlockError(f"the block's quantizer steps {steps} are impossible")
    return steps
