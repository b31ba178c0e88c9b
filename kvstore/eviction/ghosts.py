"""What is remembered of blocks that left: a bounded ring of 64-bit fingerprints, 24 bytes each.

A fingerprint that two blocks share (odds of 1 in 10^12 at a million ghosts) confuses the statistics of one block, nothing else.
"""

from __future__ import annotations

from array import array

import numpy as np

from .base import BlockId

NONE = -1
_EMPTY = 0xFFFFFFFF


class Ghosts:
    """The newest ghosts, at most `per_block` for each resident block (by the largest number of residents so far).

    Parameters
    ----------
    per_block : float
        Ghosts kept for each resident block.
    """

    def __init__(self, per_block: float) -> None:
        self.per_block = per_block
        self.count = 0
        self._origin: float | None = None
        self._at = 0
        self._clear(64)

    def remember(self, id: BlockId, state: int, time: float, residents: int) -> tuple[int, float] | None:
        """Keep `state` (32 bits, not all ones) and `time` of a block that left. Answers state and time of the ghost forgotten for it."""
        if residents * self.per_block > len(self._hash):
            self._enlarge(int(1.0625 * residents * self.per_block))
        if self._origin is None:
            self._origin = time
        at, states, forgotten = self._at, self._state, None
        self._at = at + 1 if at + 1 < len(states) else 0
        old = states[at]
        if old != _EMPTY:
            forgotten = (old, self._time[at] + self._origin)
            self._unlink(at)
        else:
            self.count += 1
        hashed, heads = hash(id), self._heads
        head = hashed & (len(heads) - 1)
        self._hash[at], states[at], self._time[at] = hashed, state, time - self._origin
        self._next[at], heads[head] = heads[head], at
        return forgotten

    def take(self, id: BlockId) -> tuple[int, float] | None:
        """State and time of a block that came back, which is a ghost no more; None for one that is not remembered."""
        at = self._locate(hash(id))
        if at < 0:
            return None
        found = (self._state[at], self._time[at] + (self._origin or 0.0))
        self._unlink(at)
        self._state[at] = _EMPTY
        self.count -= 1
        return found

    def find(self, id: BlockId) -> tuple[int, float] | None:
        """What `take` would answer; the ghost stays."""
        at = self._locate(hash(id))
        return None if at < 0 else (self._state[at], self._time[at] + (self._origin or 0.0))

    def arrays(self, limit: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
        """State and time of all ghosts, or of an even sample when there are more than `limit`; copied."""
        every = 1 + self.count // limit
        state, time = np.array(self._state[::every]), np.array(self._time[::every], dtype=np.float64)
        here = state != _EMPTY
        return state[here], time[here] + (self._origin or 0.0)

    def _locate(self, hashed: int) -> int:
        hashes, following = self._hash, self._next
        at = self._heads[hashed & (len(self._heads) - 1)]
        while at >= 0 and hashes[at] != hashed:
            at = following[at]
        return at

    def _clear(self, size: int) -> None:
        self._hash = array("q", [0]) * size
        self._time = array("f", [0.0]) * size  # seconds since the first ghost, to about 1 ms in three hours
        self._state = array("I", [_EMPTY]) * size
        self._next = array("i", [NONE]) * size
        self._heads = array("i", [NONE]) * (1 << max(size // 2, 1).bit_length())

    def _unlink(self, at: int) -> None:
        heads, following = self._heads, self._next
        head = self._hash[at] & (len(heads) - 1)
        before = heads[head]
        if before == at:
            heads[head] = following[at]
            return
        while following[before] != at:
            before = following[before]
        following[before] = following[at]

    def _enlarge(self, size: int) -> None:
        oldest_first = np.roll(np.arange(len(self._hash)), -self._at)
        kept = oldest_first[np.array(self._state)[oldest_first] != _EMPTY]
        hashes, times, states = (np.array(column)[kept] for column in (self._hash, self._time, self._state))
        self._clear(size)
        self._at = len(kept)
        self._hash[: self._at] = array("q", hashes.tobytes())
        self._time[: self._at] = array("f", times.tobytes())
        self._state[: self._at] = array("I", states.tobytes())
        following, heads = self._next, self._heads
        for at, head in enumerate((hashes & (len(heads) - 1)).tolist()):
            following[at], heads[head] = heads[head], at
