"""A directory as a tier: pages of a few large files, in a fixed amount.

A file a block was the first design; making and removing one costs up to 2 ms where the file system is a virtual machine's, twenty times
as much as writing 64 KiB. So blocks lie in segments, ``DIR/blocks/0000.kvblock`` and on, in pages that are used again, and a journal names
their places to the next process. Nothing is synced: what a crash or a power failure tears does not certify itself and is a miss. A block
that was dropped has its first bytes overwritten, so that nobody takes it for one again; the others go when its pages are used anew.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from kvstore.arena.pages import PageAllocator
from kvstore.errors import CapacityError, ConcertinaError, ConfigError, CorruptBlockError, NotFoundError, TransportError

from .base import Buffer, SpillTier, Survivor
from .journal import MAX_RUNS, Journal, Place
from .record import HEAD_BYTES

PAGE_BYTES = 4096
SUFFIX = ".kvblock"
#: A directory of N bytes has segments of about N / 64, within these bounds.
MIN_SEGMENT_BYTES, MAX_SEGMENT_BYTES = 1 << 20, 1 << 30
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WIPED = bytes(16)


class DiskTier(SpillTier):
    """Segments and a journal, readable by their owner alone.

    Parameters
    ----------
    directory : path
        Made if missing. No other living node may use it.
    capacity_bytes : int
        The segments never hold more. What an earlier process left beyond is forgotten.

    Raises
    ------
    ConfigError
        When it cannot be made or written, or another process has it.
    """

    name: ClassVar[str] = "disk"

    def __init__(self, directory: str | Path, capacity_bytes: int) -> None:
        self.directory = Path(directory)
        self._segments: dict[int, int] = {}
        self._lock = -1
        self._journal: Journal | None = None
        try:
            (self.directory / "blocks").mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            self._lock_or_refuse()
            self._journal = Journal(self.directory / "index", _segment_pages(capacity_bytes))
        except OSError as error:
            self.close()
            raise ConfigError(f"--spill {directory} cannot be used: {error.strerror}; give a directory that this user may write") from error
        self._segment_bytes = self._journal.segment_pages * PAGE_BYTES
        self._places = self._journal.places
        self._allocator = _allocator(max(1, capacity_bytes // PAGE_BYTES), self._places)

    def cost(self, size_bytes: int) -> int:
        return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages that hold blocks."""
        return self._allocator.used_pages * PAGE_BYTES

    def store(self, id: bytes, pieces: Sequence[Buffer]) -> None:
        self.drop(id)
        data = memoryview(b"".join(pieces))
        extents = self._allocator.alloc(self.cost(len(data)) // PAGE_BYTES)
        place = Place(len(data), extents)
        try:
            if len(extents) > MAX_RUNS:
                raise CapacityError(f"a spilled block would lie in {len(extents)} pieces")
            for segment, offset, start, stop in self._pieces(place, len(data)):
                _write(self._segment(segment), data[start:stop], offset)
            self._places[id] = place
            self._note(id, place)
        except (OSError, ConcertinaError) as error:
            self._places.pop(id, None)
            self._allocator.free(extents)
            raise (error if isinstance(error, ConcertinaError) else _translated(error, "written")) from error

    def load(self, id: bytes, size_bytes: int) -> Buffer:
        place = self._places.get(id)
        if place is None:
            raise NotFoundError("the block is not on the disk any more")
        if place.size_bytes != size_bytes:
            raise CorruptBlockError(f"a spilled block has {place.size_bytes} bytes, not {size_bytes}")
        return self._read(place, size_bytes)

    def drop(self, id: bytes) -> None:
        place = self._places.pop(id, None)
        if place is None:
            return
        self._allocator.free(place.extents)
        try:
            for segment, offset, start, stop in self._pieces(place, len(_WIPED)):
                os.pwrite(self._segment(segment), _WIPED[start:stop], offset)
            self._note(id, Place(0, ()))
        except OSError as error:
            raise _translated(error, "removed") from error

    def survivors(self) -> Iterator[Survivor]:
        for id, place in list(self._places.items()):
            try:
                head = self._read(place, min(place.size_bytes, HEAD_BYTES))
            except ConcertinaError:
                head = bytearray()
            yield Survivor(id, place.size_bytes, head)

    def close(self) -> None:
        for file in self._segments.values():
            os.close(file)
        self._segments.clear()
        if self._journal is not None:
            self._journal.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _lock_or_refuse(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ConfigError(f"--spill {self.directory} belongs to another living node; give each node a directory of its own") from None

    def _segment(self, number: int) -> int:
        """The open file of a segment."""
        file = self._segments.get(number)
        if file is None:
            path = self.directory / "blocks" / f"{number:04d}{SUFFIX}"
            path.parent.mkdir(exist_ok=True, mode=0o700)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            if self._segments.setdefault(number, file) != file:  # a reader and the writer came at once
                os.close(file)
        return self._segments[number]

    def _pieces(self, place: Place, size_bytes: int) -> Iterator[tuple[int, int, int, int]]:
        """The first `size_bytes` of a record: segment, offset within it, and the range of the record that lies there."""
        at, segment_bytes = 0, self._segment_bytes
        for extent in place.extents:
            offset, left = extent.start * PAGE_BYTES, min(extent.count * PAGE_BYTES, size_bytes - at)
            while left > 0:
                count = min(left, segment_bytes - offset % segment_bytes)
                yield offset // segment_bytes, offset % segment_bytes, at, at + count
                at, offset, left = at + count, offset + count, left - count

    def _read(self, place: Place, size_bytes: int) -> bytearray:
        data = bytearray(size_bytes)
        view = memoryview(data)
        try:
            for segment, offset, start, stop in self._pieces(place, size_bytes):
                if os.preadv(self._segment(segment), [view[start:stop]], offset) != stop - start:
                    raise CorruptBlockError("a segment of spilled blocks has been cut short")
        except OSError as error:
            raise _translated(error, "read") from error
        return data

    def _note(self, id: bytes, place: Place) -> None:
        self._journal.append(id, place)
        if self._journal.outgrown(len(self._places)):
            self._journal.rewrite(self._places)


def _segment_pages(capacity_bytes: int) -> int:
    """Pages of a segment for a new directory: a power of two."""
    wanted = min(max(capacity_bytes // 64, MIN_SEGMENT_BYTES), MAX_SEGMENT_BYTES)
    return (1 << (wanted.bit_length() - 1)) // PAGE_BYTES


def _allocator(pages: int, places: dict[bytes, Place]) -> PageAllocator:
    """The allocator in which the extents of `places` are taken. Places that overlap others or lie beyond the end are removed."""
    free_from, gaps = 0, []
    allocator = PageAllocator(pages)
    taken = sorted((extent, id) for id, place in places.items() for extent in place.extents)
    wrong = set()
    for extent, id in taken:
        if not extent.count or extent.start < free_from or extent.start + extent.count > pages:
            wrong.add(id)
        free_from = max(free_from, extent.start + extent.count)
    for id in wrong:
        del places[id]
    free_from = 0
    for extent, id in taken:
        if id not in wrong:
            gaps += allocator.alloc(extent.start - free_from)  # from one free run, so pages come in order
            allocator.alloc(extent.count)
            free_from = extent.start + extent.count
    allocator.free(gaps)
    return allocator


def _write(file: int, data: memoryview, offset: int) -> None:
    while len(data):
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count


def _translated(error: OSError, what: str) -> ConcertinaError:
    """Our exception for one of the file system."""
    text = f"a spilled block could not be {what}: {error.strerror or error}"
    return CapacityError(text) if error.errno in _FULL else TransportError(text)
