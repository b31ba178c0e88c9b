"""Promises that a node makes for a while: leases (not to evict what a reader fetches) and pins (not to evict what an owner wants).

Both are bounded in time, number and bytes, so that no caller, however slow or many, can freeze the arena.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence


class LeaseTable:
    """Leases over lists of blocks.

    Parameters
    ----------
    max_leases : int
        Leases held at one time.
    max_bytes : int
        Bytes under lease at one time; a block leased twice counts twice.
    rng : random.Random
        Draws the names of leases: whoever ends one must have been told it.

    `bytes` and `holds` are the sums over the leases that are held.
    """

    def __init__(self, max_leases: int, max_bytes: int, rng: random.Random) -> None:
        self.max_leases = max_leases
        self.max_bytes = max_bytes
        self.bytes = 0
        self.holds = 0
        self._leases: dict[int, tuple[list[bytes], int]] = {}
        self._expiry: list[tuple[float, int]] = []
        self._rng = rng

    def __len__(self) -> int:
        return len(self._leases)

    def grant(self, blocks: Sequence[tuple[bytes, int]], until: float) -> tuple[int, list[bytes]]:
        """Lease the longest run from the start of `blocks` (key, bytes) that the bounds allow.

        Returns
        -------
        lease : int
            0 if nothing could be leased.
        keys : list of bytes
            The keys that are under the lease.
        """
        keys: list[bytes] = []
        taken = 0
        if len(self._leases) < self.max_leases:
            for key, size_bytes in blocks:
                if self.bytes + taken + size_bytes > self.max_bytes:
                    break
                keys.append(key)
                taken += size_bytes
        if not keys:
            return 0, []
        lease = self._rng.getrandbits(63) | 1
        self._leases[lease] = (keys, taken)
        self.bytes += taken
        self.holds += len(keys)
        heapq.heappush(self._expiry, (until, lease))
        return lease, keys

    def release(self, lease: int) -> list[bytes]:
        """End a lease. Returns the keys that were under it; none if it is not known."""
        keys, taken = self._leases.pop(lease, ([], 0))
        self.bytes -= taken
        self.holds -= len(keys)
        return keys

    def expire(self, now: float) -> list[bytes]:
        """End all leases that are over. Returns the keys that were under them, once for each lease."""
        keys: list[bytes] = []
        while self._expiry and (self._expiry[0][0] <= now or self._expiry[0][1] not in self._leases):
            keys += self.release(heapq.heappop(self._expiry)[1])
        if len(self._expiry) > 2 * len(self._leases) + 64:  # many were released early: forget their places
            self._expiry = [item for item in self._expiry if item[1] in self._leases]
            heapq.heapify(self._expiry)
        return keys


class PinTable:
    """At most one pin a block, each with an end.

    Parameters
    ----------
    max_bytes : int
        Bytes pinned at one time.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._pins: dict[bytes, tuple[float, int]] = {}
        self._earliest = math.inf  # no pin ends before

    def __len__(self) -> int:
        return len(self._pins)

    def __contains__(self, key: bytes) -> bool:
        return key in self._pins

    def pin(self, key: bytes, size_bytes: int, until: float) -> bool | None:
        """Pin a block, or prolong its pin (a pin is never made shorter).

        Returns
        -------
        bool or None
            True for a new pin, False for one that was there already, None if the bound on bytes forbids it.
        """
        self._earliest = min(self._earliest, until)
        if key in self._pins:
            end, size = self._pins[key]
            self._pins[key] = (max(end, until), size)
            return False
        if self.bytes + size_bytes > self.max_bytes:
            return None
        self._pins[key] = (until, size_bytes)
        self.bytes += size_bytes
        return True

    def unpin(self, key: bytes) -> bool:
        """End a pin. Returns whether there was one."""
        pin = self._pins.pop(key, None)
        if pin is None:
            return False
        self.bytes -= pin[1]
        return True

    def expire(self, now: float) -> list[bytes]:
        """End all pins that are over. Returns their keys."""
        if now < self._earliest:
            return []
        ended = [key for key, (end, _) in self._pins.items() if end <= now]
        for key in ended:
            self.unpin(key)
        self._earliest = min((end for end, _ in self._pins.values()), default=math.inf)
        return ended
