"""Memory for blocks that arrive: used again once nobody holds the block, since fresh memory costs more than the copy into it."""

from __future__ import annotations

import weakref
from collections import defaultdict

import numpy as np

from kvstore.checked_copy import address_of

#: Several small blocks that arrive together share a buffer of this size.
SHARED_BYTES = 4 << 20
#: Where a buffer begins. The memory allocator begins 16 bytes behind a page, and each store of a copy from the start of one there looks to
#: the processor as if it could change what is read next: such copies are half as fast.
ALIGNMENT = 64


class Buffers:
    """Hands out buffers, and takes each back when the last view of it is gone. May be called from any thread.

    Parameters
    ----------
    keep_bytes : int
        Of unused buffers, kept for the next call of `take`.
    """

    def __init__(self, keep_bytes: int) -> None:
        self.kept_bytes = 0
        self._keep_bytes = keep_bytes
        self._free: defaultdict[int, list[np.ndarray]] = defaultdict(list)

    def take(self, size_bytes: int) -> memoryview:
        """A buffer of `size_bytes` bytes, of whatever content."""
        room = _room(size_bytes)
        try:
            whole = self._free[room].pop()
            self.kept_bytes -= room
        except IndexError:
            whole = _aligned(room)
        view = whole[:size_bytes]
        weakref.finalize(view, self._give_back, whole).atexit = False
        return memoryview(view)  # parts of it keep the view alive; a part of an array would only keep `whole`

    def trim(self) -> None:
        """Free what is kept."""
        self._free.clear()
        self.kept_bytes = 0

    def _give_back(self, whole: np.ndarray) -> None:
        if self.kept_bytes + len(whole) <= self._keep_bytes:
            self.kept_bytes += len(whole)
            self._free[len(whole)].append(whole)


class Carver:
    """Buffers for one reader, one block after the other."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._rest = memoryview(b"")
        self._address = 0

    def take(self, size_bytes: int) -> tuple[memoryview, int]:
        """A buffer of `size_bytes` bytes, of whatever content, and its address."""
        if size_bytes > SHARED_BYTES // 4:
            whole = self._buffers.take(size_bytes)
            return whole, address_of(whole)
        if size_bytes > len(self._rest):
            self._rest = self._buffers.take(SHARED_BYTES)
            self._address = address_of(self._rest)
        part, address, step = self._rest[:size_bytes], self._address, -(-size_bytes // ALIGNMENT) * ALIGNMENT
        self._rest, self._address = self._rest[step:], address + step
        return part, address


def _aligned(size_bytes: int) -> np.ndarray:
    """Fresh memory that begins with a line of the processor's cache."""
    memory = np.empty(size_bytes + ALIGNMENT, np.uint8)
    skip = -memory.ctypes.data % ALIGNMENT
    return memory[skip : skip + size_bytes]


def _room(size_bytes: int) -> int:
    """`size_bytes` rounded up by at most an eighth, so that blocks of about one size share buffers."""
    step = max(4096, 1 << max(0, size_bytes.bit_length() - 4))
    return -(-size_bytes // step) * step
