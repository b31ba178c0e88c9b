"""Where a node says that blocks lie in its shared memory, and copying them from there."""

from __future__ import annotations

import struct
from collections.abc import Sequence
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
#: Of a block of one layer, copied in one go: number and last row of each layer.
_ONE_LAYER = ((1, 0),)
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
        self._places: list[tuple[int, int]] = []  # of each block: its buffer, and where it begins there
        self._layers: list[tuple[int, int]] = []  # block and number of each layer that is not empty
        # Of the copies: the rows, as `copy_rows` takes them, and the buffers; of those layers the last row, and the CRC due there.
        self._rows, self._buffers, self._ends, self._crcs, self.marks = self._columns(memory, count)

    def _columns(self, memory: SharedMemory, count: int) -> tuple[np.ndarray, ...]:
        """Read the entries in one pass: of a damaged one, and of what is behind it, nothing is kept."""
        said, at, headers, entry, room = self.said, 0, self.headers, door.PLANNED, self._room
        rows, buffers, ends, crcs, marks = [], [], [], [], []  # flat
        try:
            while len(headers) < count:
                status, header_bytes, runs, mark, state = entry.unpack_from(said, at)
                header_at = at + entry.size
                runs_at = header_at + header_bytes
                at = runs_at + runs * door.RUN.size
                if at > len(said):
                    raise CorruptBlockError(CUT_SHORT)
                if status != OK:
                    break
                header = _parse_header(said[header_at:runs_at])
                pieces, layers = _pieces_of(header, said[runs_at:at], memory)
                number, start = place = room(header.payload_bytes)
                for layer, end in layers:
                    self._layers.append((len(headers), layer))
                    ends.append(len(buffers) + end)
                    crcs.append(header.rows[layer - 1].crc32c)
                for within, address, size, before in pieces:
                    rows += (start + within, address, size, before)
                    buffers.append(number)
                marks += (mark, state)
                self._places.append(place)
                headers.append(header)
        except struct.error:
            self.damage = CUT_SHORT
        except CorruptBlockError as error:
            self.damage = str(error)
        flat = [np.array(column, np.uint64) for column in (rows, buffers, ends, crcs, marks)]
        return flat[0].reshape(-1, 4), *flat[1:4], flat[4].reshape(-1, 2)

    @property
    def size_bytes(self) -> int:
        """Of the memory that `copy` takes."""
        return sum(self._sizes)

    def copy(self, memory: SharedMemory, buffers: Buffers) -> Copied:
        """Copy them out of `memory`. What came out is to be looked at (`Copied.sound`)."""
        views = [buffers.take(size) for size in self._sizes]
        blocks = []  # before the copy: it leaves nothing of Python's in the processor's cache
        for header, (number, start) in zip(self.headers, self._places, strict=True):
            view, parts = views[number], []
            for row in header.rows[: header.present]:
                parts.append(view[start : start + row.size_bytes])
                start += row.size_bytes
            blocks.append(EncodedBlock(header, tuple(parts)))
        rows = self._rows.copy()
        if views:
            rows[:, 0] += np.array([address_of(view) for view in views], np.uint64)[self._buffers]
        memory.copy(rows)
        return Copied(blocks, *self._whole(rows[:, 3]), memory.sound(self.marks))

    def _whole(self, crcs: np.ndarray) -> tuple[int, str]:
        """How many leading blocks have the CRCs that their rows were found to have, and what is wrong with the next."""
        for wrong in np.flatnonzero(crcs[self._ends] != self._crcs)[:1].tolist():
            block, layer = self._layers[wrong]
            try:
                self.headers[block].check_layer(layer, int(crcs[self._ends[wrong]]))
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


def _pieces_of(
    header: BlockHeader, runs: bytes, memory: SharedMemory
) -> tuple[Sequence[tuple[int, int, int, int]], Sequence[tuple[int, int]]]:
    """The rows of a block as `copy_rows` takes them, from its beginning; the number of each layer that is not empty, and its last row.

    Raises CorruptBlockError where the runs are not the block's.
    """
    total = header.payload_bytes
    if not total:
        raise CorruptBlockError("a block without payload came through the door")
    if header.present == 1 and len(runs) == door.RUN.size:  # most blocks
        offset, size = door.RUN.unpack(runs)
        if size != total or offset + size > memory.size_bytes:
            raise CorruptBlockError(UNFIT)
        return ((0, memory.address + offset, size, 0),), _ONE_LAYER
    left = list(door.RUN.iter_unpack(runs))[::-1]
    pieces, layers, start = [], [], 0
    for number, row in enumerate(header.rows[: header.present], 1):
        at = start
        while at < start + row.size_bytes:
            offset, size = left.pop() if left else (0, 0)
            if not 0 < size <= start + row.size_bytes - at or offset + size > memory.size_bytes:
                raise CorruptBlockError(UNFIT)
            pieces.append((at, memory.address + offset, size, GO_ON if at > start else 0))
            at += size
        if at > start:
            layers.append((number, len(pieces) - 1))
        else:
            header.check_layer(number, 0)
        start = at
    if left:
        raise CorruptBlockError(UNFIT)
    return pieces, layers
