"""Which pages of a disk tier hold which block, as a log that the next process reads.

It is a hint and nothing more: what it leads to certifies itself or is a miss. So nothing is synced, and reading stops at the first
entry that is torn or damaged. Layout, little-endian::

    head    magic "KVSJ" | version u16 | 0 u16 | pages of a segment u32
    entry   CRC-32C of the rest u32 | runs u16 | 0 u16 | bytes u32 | id 32 | for each run: first page u32, pages u32

An entry without runs says that its id was dropped.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from crc32c import crc32c

from kvstore.arena.pages import Extent

MAGIC, VERSION = b"KVSJ", 1
#: The journal is written afresh when so many of its entries are outdated, and half of them are.
SLACK_ENTRIES = 4096
MAX_RUNS = 1024
_HEAD = struct.Struct("<4sHHI")
_CRC = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI32s")
_RUN = struct.Struct("<II")


class Place(NamedTuple):
    """Where a block's record lies."""

    size_bytes: int
    extents: tuple[Extent, ...]


class Journal:
    """The log of one directory, open for appending.

    Parameters
    ----------
    path : Path
    segment_pages : int
        Of a new journal; that of an older one stays.

    `places` are the living blocks that it named when it was opened, oldest first.
    """

    def __init__(self, path: Path, segment_pages: int) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        data = path.read_bytes()
        self.segment_pages = segment_pages
        self.places: dict[bytes, Place] = {}
        self._entries = 0
        if len(data) >= _HEAD.size and data[:6] == MAGIC + VERSION.to_bytes(2, "little"):
            self.segment_pages = max(1, _HEAD.unpack_from(data)[3])
            for id, place in _read(data):
                self.places.pop(id, None)
                if place.extents:
                    self.places[id] = place
        self.rewrite(self.places)

    def append(self, id: bytes, place: Place) -> None:
        """Note where a block is; no extents where it is no more. Raises OSError."""
        os.write(self._file, _entry(id, place))
        self._entries += 1

    def outgrown(self, living: int) -> bool:
        """Whether it is time for `rewrite`."""
        return self._entries > 2 * living + SLACK_ENTRIES

    def rewrite(self, places: dict[bytes, Place]) -> None:
        """Replace the file by one that names `places` alone. Raises OSError."""
        draft = self._path.with_suffix(".new")
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
            file.write(_HEAD.pack(MAGIC, VERSION, 0, self.segment_pages))
            file.writelines(_entry(id, place) for id, place in places.items())
        draft.replace(self._path)
        self.close()
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._entries = len(places)

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _entry(id: bytes, place: Place) -> bytes:
    rest = _ENTRY.pack(len(place.extents), 0, place.size_bytes, id) + b"".join(_RUN.pack(*extent) for extent in place.extents)
    return _CRC.pack(crc32c(rest)) + rest


def _read(data: bytes) -> Iterator[tuple[bytes, Place]]:
    """The entries after the head, up to the first that is not whole."""
    at, fixed = _HEAD.size, _CRC.size + _ENTRY.size
    while at + fixed <= len(data):
        runs, _, size, id = _ENTRY.unpack_from(data, at + _CRC.size)
        end = at + fixed + runs * _RUN.size
        if end > len(data) or runs > MAX_RUNS or crc32c(memoryview(data)[at + _CRC.size : end]) != _CRC.unpack_from(data, at)[0]:
            return
        yield id, Place(size, tuple(Extent(*_RUN.unpack_from(data, at + fixed + number * _RUN.size)) for number in range(runs)))
        at = end
