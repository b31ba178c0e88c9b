"""Doubly linked queues of slots, threaded through two flat arrays: 8 bytes a block, every operation in constant time."""

from __future__ import annotations

from array import array

NONE = -1


class SlotQueues:
    """Queues numbered from 0; a slot stands in at most one, which its owner remembers.

    Attributes
    ----------
    head, tail : list of int
        First and last slot of each queue, -1 when it is empty.
    length : list of int
    """

    def __init__(self, queues: int = 0) -> None:
        self.head = [NONE] * queues
        self.tail = [NONE] * queues
        self.length = [0] * queues
        self._before = array("i")
        self._after = array("i")

    def reserve(self, slots: int) -> None:
        """Make room for slots below `slots`."""
        missing = slots - len(self._before)
        if missing > 0:
            self._before.extend([NONE] * missing)
            self._after.extend([NONE] * missing)

    def new(self) -> int:
        """Number of a new, empty queue."""
        self.head.append(NONE)
        self.tail.append(NONE)
        self.length.append(0)
        return len(self.head) - 1

    def append(self, queue: int, slot: int) -> None:
        """Put `slot`, which stands in no queue, at the end."""
        last = self.tail[queue]
        self._before[slot], self._after[slot] = last, NONE
        self.tail[queue] = slot
        if last >= 0:
            self._after[last] = slot
        else:
            self.head[queue] = slot
        self.length[queue] += 1

    def prepend(self, queue: int, slot: int) -> None:
        """Put `slot`, which stands in no queue, at the front."""
        first = self.head[queue]
        self._before[slot], self._after[slot] = NONE, first
        self.head[queue] = slot
        if first >= 0:
            self._before[first] = slot
        else:
            self.tail[queue] = slot
        self.length[queue] += 1

    def remove(self, queue: int, slot: int) -> None:
        """Take `slot` out of the queue that it stands in."""
        before, after = self._before[slot], self._after[slot]
        if before >= 0:
            self._after[before] = after
        else:
            self.head[queue] = after
        if after >= 0:
            self._before[after] = before
        else:
            self.tail[queue] = before
        self.length[queue] -= 1

    def join(self, queue: int, other: int) -> None:
        """Move all of `other`, which is left empty, to the end of `queue`. Neither is empty."""
        last, first = self.tail[queue], self.head[other]
        self._after[last], self._before[first] = first, last
        self.tail[queue] = self.tail[other]
        self.length[queue] += self.length[other]
        self.head[other] = self.tail[other] = NONE
        self.length[other] = 0
