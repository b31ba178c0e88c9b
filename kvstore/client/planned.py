"""Where a node says that blocks lie in its shared memory, and copying them from there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from kvstore import door
from kvstore.block import BlockHeader, EncodedBlock
from kvstore.checked_copy import GO_ON, address_of
from kvstore.errors import CorruptBlockError

from .buffers import ALIGNMENT, SHARED_BYTES, Buffers

if TYPE_CHECKING:
    from .shared import SharedMemory

OK = 1
UNFIT = "a plan of the door does not fit its block or its arena"
CUT_SHORT = "a plan of the door is cut short"
#: Headers of what was read lately, in whatever company.
_parse_header = lru_cache(maxsize=4096)(BlockHeader.from_bytes)


class Plan:
    """The leading blocks of a batch that are there, and how they are copied: made once, for a prefix is often read again where it lay.

    Parameters
    ----------
    said : bytes
        The entries of PLANNED (`kvstore.door`).
    count : int
        Blocks that were asked for, or the leading ones of them that are wanted.
    memory : SharedMemory
        That of the node. It is not kept: plans are kept with it.

    Attributes
    ----------
    headers : list of BlockHeader
    damage : str
        What is wrong with the entry behind them; empty for nothing.
    marks : uint64 [blocks, (place in the memory, number there)]
        See `SharedMemory.sound`.
    """

    def __init__(self, said: bytes, count: int, memory: SharedMemory) -> None:
        self.said, self.damage = said, ""
        self.headers: list[BlockHeader] = []
        self._sizes: list[int] = []  # of the buffers: a large block has its own, small ones share some
        self._places: list[tuple[int, list[tuple[int, int]]]] = []  # of each block: its buffer, and there the range of each layer
        self._layers: list[tuple[int, int, int]] = []  # block and number of each layer that is not empty, and its last row
        rows: list[tuple[int, int, int, int]] = []
        buffers: list[int] = []  # of each row
        marks: list[tuple[int, int]] = []
        try:
            for header, runs, mark in _entries(said, count):
                layers = _rows_of(header, runs, memory)
                number, start = self._room(header.payload_bytes)
                ranges = []
                for layer, (row, pieces) in enumerate(zip(header.rows, layers, strict=False), 1):
                    ranges.append((start, start := start + row.size_bytes))
                    for at, address, size, before in pieces:
                        rows.append((ranges[-1][0] + at, address, size, before))
                        buffers.append(number)
                    if pieces:
                        self._layers.append((len(self.headers), layer, len(rows) - 1))
                marks.append(mark)
                self._places.append((number, ranges))
                self.headers.append(header)
        except CorruptBlockError as error:
            self.damage = str(error)
        self._rows = np.array(rows, np.uint64).reshape(-1, 4)
        self._buffers = np.array(buffers, np.intp)
        self.marks = np.array(marks, np.uint64).reshape(-1, 2)

    def copy(self, memory: SharedMemory, buffers: Buffers) -> Copied:
        """Copy them out of `memory`. What came out is to be looked at (`Copied.sound`)."""
        views = [buffers.take(size) for size in self._sizes]
        blocks = []  # before the copy: it leaves nothing of Python's in the processor's cache
        for header, (number, ranges) in zip(self.headers, self._places, strict=True):
            view = views[number]
            blocks.append(EncodedBlock(header, tuple([view[start:stop] for start, stop in ranges])))
        rows = self._rows.copy()
        if views:
            rows[:, 0] += np.array([address_of(view) for view in views], np.uint64)[self._buffers]
        memory.copy(rows)
        return Copied(blocks, *self._whole(rows[:, 3].tolist()), memory.sound(self.marks))

    def _whole(self, crcs: list[int]) -> tuple[int, str]:
        """How many leading blocks have the CRCs that their rows were found to have, and what is wrong with the next."""
        for block, layer, row in self._layers:
            try:
                self.headers[block].check_layer(layer, crcs[row])
            except CorruptBlockError as error:
                return block, str(error)
        return len(self.headers), ""

    def _room(self, size: int) -> tuple[int, int]:
        """A buffer for a block of `size` bytes, by number, and where in it the block begins."""
        at = -(-self._sizes[-1] // ALIGNMENT) * ALIGNMENT if self._sizes else 0
        if not self._sizes or size > SHARED_BYTES // 4 or at + size > SHARED_BYTES:
            self._sizes.append(0)
            at = 0
        self._sizes[-1] = at + size
        return len(self._sizes) - 1, at


@dataclass(frozen=True, slots=True)
class Copied:
    """Blocks that were copied as a plan says.

    Attributes
    ----------
    blocks : list of EncodedBlock
    whole : int
        How many leading ones are intact.
    damage : str
        What is wrong with the next.
    there : int
        How many leading ones still were the node's own after the copy.
    """

    blocks: list[EncodedBlock]
    whole: int
    damage: str
    there: int

    def sound(self, count: int, damage: str) -> tuple[list[EncodedBlock], str]:
        """Of the first `count` the leading ones that are intact and the node's own; and what is wrong with a damaged next.

        `damage` is what is wrong behind the first `count`.
        """
        looked_at = count
        if self.whole < count:
            count, looked_at, damage = self.whole, self.whole + 1, self.damage
        # What another block was written over meanwhile is not damaged, but gone.
        return self.blocks[: min(count, self.there)], damage if self.there >= looked_at else ""


def _entries(said: bytes, count: int) -> Iterator[tuple[BlockHeader, list[tuple[int, int]], tuple[int, int]]]:
    """Each leading block that is there: header, runs in reverse, mark. Raises CorruptBlockError for a plan that is cut short."""
    at = 0
    for _ in range(count):
        begin = at + door.PLANNED.size
        if begin > len(said):
            raise CorruptBlockError(CUT_SHORT)
        status, header_bytes, runs, mark, state = door.PLANNED.unpack_from(said, at)
        runs_at = begin + header_bytes
        at = runs_at + runs * door.RUN.size
        if at > len(said):
            raise CorruptBlockError(CUT_SHORT)
        if status != OK:
            return
        yield _parse_header(said[begin:runs_at]), list(door.RUN.iter_unpack(said[runs_at:at]))[::-1], (mark, state)


def _rows_of(header: BlockHeader, runs: list[tuple[int, int]], memory: SharedMemory) -> list[list[tuple[int, int, int, int]]]:
    """Of each layer its rows, as `copy_rows` takes them, from the beginning of the layer; `runs` are used up from the end.

    Raises CorruptBlockError where the runs are not the block's.
    """
    if not header.payload_bytes:
        raise CorruptBlockError("a block without payload came through the door")
    layers = []
    for number, row in enumerate(header.rows[: header.present], 1):
        at, pieces = 0, []
        while at < row.size_bytes:
            offset, size = runs.pop() if runs else (0, 0)
            if not 0 < size <= row.size_bytes - at or offset + size > memory.size_bytes:
                raise CorruptBlockError(UNFIT)
            pieces.append((at, memory.address + offset, size, GO_ON if at else 0))
            at += size
        if not pieces:
            header.check_layer(number, 0)
        layers.append(pieces)
    if runs:
        raise CorruptBlockError(UNFIT)
    return layers
