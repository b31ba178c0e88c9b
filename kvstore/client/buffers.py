"""Memory for blocks that arrive: used again once nobody holds the block, since fresh memory costs more than the copy into it."""

from __future__ import annotations

import weakref
from collections import defaultdict

import numpy as np

#: Smaller ones are not worth keeping.
MIN_KEPT_BYTES = 32 << 10


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

    def take(self, size_bytes: int) -> np.ndarray:
        """A buffer, uint8 [size_bytes], of whatever content."""
        if size_bytes < MIN_KEPT_BYTES:
            return np.empty(size_bytes, np.uint8)
        room = _room(size_bytes)
        try:
            whole = self._free[room].pop()
            self.kept_bytes -= room
        except IndexError:
            whole = np.empty(room, np.uint8)
        view = whole[:size_bytes]
        weakref.finalize(view, self._give_back, whole).atexit = False
        return view

    def trim(self) -> None:
        """Free what is kept."""
        self._free.clear()
        self.kept_bytes = 0

    def _give_back(self, whole: np.ndarray) -> None:
        if self.kept_bytes + len(whole) <= self._keep_bytes:
            self.kept_bytes += len(whole)
            self._free[len(whole)].append(whole)


def _room(size_bytes: int) -> int:
    """`size_bytes` rounded up by at most an eighth, so that blocks of about one size share buffers."""
    step = max(4096, 1 << max(0, size_bytes.bit_length() - 4))
    return -(-size_bytes // step) * step
