"""Where blocks lie in a node's memory, in memory of its own: written by the node, read by guests of its host without asking it.

A key's first 8 bytes choose a bucket of `WAYS` rows and mark its row there; a row is ``bytes u16 | entry``, the entry as PLANNED says it
(`kvstore.door`). A row that is out of date, or half written, does no harm: a reader believes nothing that the block's mark, its header's
CRC and those of its payload do not confirm after the copy, and asks the node about what it does not find. So nobody takes rows back, and
a full bucket loses any of them.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence

import numpy as np

from .device import sealed_memory

#: Rows of a bucket, and bytes of a row: of longer entries, blocks in many pieces, there is none.
WAYS, ROW_BYTES = 16, 512
_LENGTH, _TAG_BYTES = struct.Struct("<H"), 8
#: A row for so many bytes of arena, up to `MAX_ROWS`.
ARENA_BYTES_A_ROW = 32 << 10
MIN_ROWS, MAX_ROWS = 1 << 10, 1 << 16


def create_catalogue(arena_bytes: int) -> tuple[int, Catalogue]:
    """An empty one for an arena of so many bytes, and the descriptor by which others may read it."""
    rows = min(max(arena_bytes // ARENA_BYTES_A_ROW, MIN_ROWS), MAX_ROWS)
    size_bytes = (1 << (rows - 1).bit_length()) * (_TAG_BYTES + ROW_BYTES)
    writable = sealed_memory("concertina-catalogue", size_bytes)
    try:
        memory = np.frombuffer(mmap.mmap(writable, size_bytes, mmap.MAP_SHARED), np.uint8)
        return os.open(f"/proc/self/fd/{writable}", os.O_RDONLY), Catalogue(memory)
    finally:
        os.close(writable)


class Catalogue:
    """The table in `memory`.

    Parameters
    ----------
    memory : uint8 [bytes]
        Zeros at first. Writable for the node alone.
    """

    def __init__(self, memory: np.ndarray) -> None:
        rows = len(memory) // (_TAG_BYTES + ROW_BYTES) // WAYS * WAYS
        self._buckets, self._lost = rows // WAYS, 0
        self._tags = memory[: rows * _TAG_BYTES].data.cast("Q")
        self._rows = memory[rows * _TAG_BYTES : rows * (_TAG_BYTES + ROW_BYTES)].data

    def note(self, key: bytes, entry: bytes) -> None:
        """Write down what the node says of the block of `key`."""
        if _LENGTH.size + len(entry) > ROW_BYTES:
            return
        tag, first, tags = self._bucket(key)
        for wanted in (tag, 0):  # its own row, a free one, or anybody's
            if wanted in tags:
                way = tags.index(wanted)
                break
        else:
            way = self._lost = (self._lost + 1) % WAYS
        at = (first + way) * ROW_BYTES
        self._tags[first + way] = 0
        self._rows[at : at + _LENGTH.size + len(entry)] = _LENGTH.pack(len(entry)) + entry
        self._tags[first + way] = tag

    def find(self, keys: Sequence[bytes]) -> bytes | None:
        """The entries of these blocks, as they would stand in PLANNED; None unless all seem to be there."""
        found = []
        for key in keys:
            tag, first, tags = self._bucket(key)
            if tag not in tags:
                return None
            at = (first + tags.index(tag)) * ROW_BYTES
            row = self._rows[at : at + ROW_BYTES].tobytes()
            (length,) = _LENGTH.unpack_from(row)
            found.append(row[_LENGTH.size : _LENGTH.size + length])
        return b"".join(found)

    def _bucket(self, key: bytes) -> tuple[int, int, list[int]]:
        """The tag of a key, and the first row of its bucket and the tags there."""
        tag = int.from_bytes(key[:_TAG_BYTES], "little")
        first = tag % self._buckets * WAYS
        return tag, first, self._tags[first : first + WAYS].tolist()
