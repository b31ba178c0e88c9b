"""The bytes of one layer of precision.

Little-endian::

    flags u8 | passes u8 | step index i16 a pass
    words u32 of each stream: group by group, pass by pass within a group
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

from .ladder import MAX_PASSES, Ladder

EXACT, BFLOAT16 = 1, 2


@dataclass(frozen=True, slots=True)
class LayerPayload:
    """One layer of precision, parsed but not decoded.

    Parameters
    ----------
    steps : list of int
        Step index of each of its passes.
    words : list (groups) of list (passes) of uint16 arrays
    exact : bytes
        The first token's values, empty where there is none.
    bfloat16 : bool
        Their type.
    """

    steps: list[int]
    words: list[list[np.ndarray]]
    exact: bytes = b""
    bfloat16: bool = False

    def to_bytes(self) -> bytes:
        flags = (EXACT if self.exact else 0) | (BFLOAT16 if self.bfloat16 else 0)
        streams = [stream for group in self.words for stream in group]
        head = struct.pack(f"<BB{len(self.steps)}h{len(streams)}I", flags, len(self.steps), *self.steps, *(len(s) for s in streams))
        return b"".join([head, self.exact, *(s.astype("<u2").tobytes() for s in streams)])

    @classmethod
    def from_bytes(cls, data: memoryview, groups: int, exact_bytes: int) -> LayerPayload:
        """Parse untrusted bytes; allocates no more than they hold.

        Parameters
        ----------
        groups : int
            Of the profile.
        exact_bytes : int
            Bytes of an exact first token here, 0 where there must be none.

        Raises
        ------
        CorruptBlockError
        """
        if len(data) < 2:
            raise CorruptBlockError("a layer of precision has fewer bytes than its head")
        flags, passes = data[0], data[1]
        if not 1 <= passes <= MAX_PASSES or flags not in ((EXACT, EXACT | BFLOAT16) if exact_bytes else (0,)):
            raise CorruptBlockError(f"a layer of precision claims {passes} passes and flags {flags:#x}")
        head = struct.Struct(f"<BB{passes}h{groups * passes}I")
        if len(data) < head.size + exact_bytes:
            raise CorruptBlockError("a layer of precision is shorter than its head says")
        fields = head.unpack_from(data)
        steps, sizes = list(fields[2 : 2 + passes]), fields[2 + passes :]
        if len(data) != head.size + exact_bytes + 2 * sum(sizes):
            raise CorruptBlockError("the streams of a layer of precision do not fill it")
        words = np.frombuffer(data[head.size + exact_bytes :], dtype="<u2")
        ends = np.cumsum([0, *sizes])
        streams = [words[a:b] for a, b in zip(ends, ends[1:], strict=False)]
        return cls(
            steps, [streams[g * passes : (g + 1) * passes] for g in range(groups)],
            bytes(data[head.size : head.size + exact_bytes]), bool(flags & BFLOAT16),
        )  # fmt: skip


def joined(layers: Sequence[LayerPayload]) -> tuple[Ladder, list[tuple[np.ndarray, np.ndarray]]]:
    """The ladder of all layers together, and for each group its words of all passes with the ends of each.

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
    return Ladder.of(steps), groups
