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
    words : list (groups, and classes of each) of list (passes) of uint16 arrays
    exact : bytes
        The first token's values, empty where there is none.
    bfloat16 : bool
        Their type.
    """

    steps: list[int]
    words: list[list[np.ndarray]]
    exact: bytes = b""
    bfloat16: bool = False
    classes: TokenClasses | None = None

    def to_bytes(self) -> bytes:
        flags = (EXACT if self.exact else 0) | (BFLOAT16 if self.bfloat16 else 0) | (CLASSED if self.classes else 0)
        streams = [stream for group in self.words for stream in group]
        head = struct.pack(f"<BB{len(self.steps)}h", flags, len(self.steps), *self.steps)
        classes = self.classes.to_bytes() if self.classes else b""
        sizes = struct.pack(f"<{len(streams)}I", *(len(s) for s in streams))
        return b"".join([head, classes, sizes, self.exact, *(s.astype("<u2").tobytes() for s in streams)])

    @classmethod
    def from_bytes(cls, data: memoryview, streams: int, exact_bytes: int = 0, tokens: int = 0) -> LayerPayload:
        """Parse untrusted bytes; allocates no more than they hold.

        Parameters
        ----------
        streams : int
            A pass: the groups of the profile, times the classes in the base layer for any other layer.
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
            streams *= len(classes.runs)
        head = struct.Struct(f"<{streams * passes}I")
        if len(data) < at + head.size + exact_bytes:
            raise CorruptBlockError("a layer of precision is shorter than its head says")
        steps, sizes = list(struct.unpack_from(f"<{passes}h", data, 2)), head.unpack_from(data, at)
        at += head.size
        if len(data) != at + exact_bytes + 2 * sum(sizes):
            raise CorruptBlockError("the streams of a layer of precision do not fill it")
        ends = np.cumsum([0, *sizes])
        words = np.frombuffer(data[at + exact_bytes :], dtype="<u2")
        each = [words[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
        return cls(
            steps, [each[s * passes : (s + 1) * passes] for s in range(streams)],
            bytes(data[at : at + exact_bytes]), bool(flags & BFLOAT16), classes,
        )  # fmt: skip


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
    steps = [m for layer in layers for m in layer.steps]
    if not Ladder.possible(steps):
        raise CorruptBlockError(f"the block's quantizer steps {steps} are impossible")
    groups = []
    for g in range(len(layers[0].words)):
        streams = [stream for layer in layers for stream in layer.words[g]]
        ends = np.cumsum([0, *(len(s) for s in streams)])
        groups.append((np.concatenate(streams).astype(np.uint16), ends.astype(np.int64)))
    return steps, groups
