"""Candidates for the next step down, in groups of one value curve, each ordered by the time of the last use.

A group is a list of at most `_CELLS` cells, each a linked queue of blocks that were last used at about the same time; when there are
too many, the older ones are joined two by two, so cells of old blocks span more time. So a block costs two links, whatever the number
of groups, and finding, adding and removing one takes a binary search among the cells. Both ends of a group are
candidates, its least and its most recently used block: when a working set is larger than the store, recency alone throws out just
what comes back next.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Hashable
from heapq import heappop, heappush

from .queues import SlotQueues

_CELLS, _YOUNG = 48, 16


class _Group:
    """Cells by time: where each starts, and its queue. `newest` is the latest time that was ever added.

    `old` and `young` are the ends when the group was last priced, in which `round` of prices, and what they cost.
    """

    __slots__ = ("newest", "old", "old_price", "queues", "round", "starts", "young", "young_price")

    def __init__(self) -> None:
        self.newest = float("-inf")
        self.starts: list[float] = []
        self.queues: list[int] = []
        self.round = 0
        self.old = self.young = -1
        self.old_price = self.young_price = 0.0


class Candidates:
    """Groups of candidates, and the cheapest of their ends.

    Parameters
    ----------
    price : callable
        ``price(slot, now)``: value of the next step of the block in `slot`.
    last_used : array of float
        Seconds, by slot; must not change while a slot stands here.
    refresh_s : float
        Prices of groups that nothing happened to are kept for this long.
    """

    def __init__(self, price: Callable[[int, float], float], last_used: array[float], refresh_s: float = 0.5) -> None:
        self._price = price
        self._last_used = last_used
        self._refresh_s = refresh_s
        self._queues = SlotQueues()
        self._free_queues: list[int] = []
        self._groups: list[_Group] = []
        self._number: dict[Hashable, int] = {}
        self._listed = bytearray()
        self._prices: list[float] = []
        self._ends: list[int] = []
        self._heap: list[tuple[float, int]] = []
        self._dirty: set[int] = set()
        self._priced_at = float("-inf")
        self._round, self._round_at = 1, float("-inf")

    def reserve(self, slots: int) -> None:
        """Make room for slots below `slots`."""
        self._queues.reserve(slots)
        self._listed.extend(bytes(max(slots - len(self._listed), 0)))

    def __contains__(self, slot: int) -> bool:
        return bool(self._listed[slot])

    def add(self, key: int, slot: int) -> None:
        """List `slot`, which is not listed, in the group `key`."""
        number = self._number.get(key)
        if number is None:
            number = self._number[key] = len(self._groups)
            self._groups.append(_Group())
            self._prices.append(float("inf"))
            self._ends.append(-1)
        group, time = self._groups[number], self._last_used[slot]
        queue = self._cell(group, time)
        tail = self._queues.tail[queue]
        if tail < 0 or self._last_used[tail] <= time:
            self._queues.append(queue, slot)
        else:
            self._queues.prepend(queue, slot)
        if slot == group.old or slot == group.young:
            group.round = 0  # it comes back, perhaps with another price
        self._listed[slot] = 1
        self._dirty.add(number)

    def remove(self, key: int, slot: int) -> None:
        """Take `slot` out of the group `key` if it is listed."""
        if not self._listed[slot]:
            return
        number = self._number[key]
        group = self._groups[number]
        at = max(bisect_right(group.starts, self._last_used[slot]) - 1, 0)
        queue = group.queues[at]
        self._queues.remove(queue, slot)
        self._listed[slot] = 0
        if not self._queues.length[queue]:
            del group.starts[at], group.queues[at]
            self._free_queues.append(queue)
        self._dirty.add(number)

    def stale(self) -> None:
        """The prices changed: all groups are priced afresh at the next `cheapest`."""
        self._priced_at = self._round_at = float("-inf")

    def cheapest(self, now: float) -> tuple[float, int] | None:
        """Price and slot of the cheapest end of any group; None when nothing is listed."""
        heap, prices, ends = self._heap, self._prices, self._ends
        if now != self._round_at:
            self._round, self._round_at = self._round + 1, now
        if now - self._priced_at >= self._refresh_s:
            self._priced_at = now
            self._dirty.update(range(len(self._groups)))
            heap.clear()
        elif len(heap) > 8 * len(prices) + 256:
            heap[:] = sorted((prices[number], number) for number in range(len(prices)) if ends[number] >= 0)
        for number in self._dirty:
            self._reprice(number, now)
            if ends[number] >= 0:
                heappush(heap, (prices[number], number))
        self._dirty.clear()
        while heap:
            price, number = heap[0]
            if prices[number] == price:
                return price, ends[number]
            heappop(heap)  # the group was priced again since
        return None

    def _reprice(self, number: int, now: float) -> None:
        group = self._groups[number]
        if not group.queues:
            self._prices[number], self._ends[number] = float("inf"), -1
            return
        oldest, youngest, round = self._queues.head[group.queues[0]], self._queues.tail[group.queues[-1]], self._round
        if group.round != round or group.old != oldest:
            group.old, group.old_price = oldest, self._price(oldest, now)
        if group.round != round or group.young != youngest:
            group.young, group.young_price = youngest, group.old_price if youngest == oldest else self._price(youngest, now)
        group.round = round
        young = group.young_price < group.old_price
        self._prices[number], self._ends[number] = (group.young_price, youngest) if young else (group.old_price, oldest)

    def _cell(self, group: _Group, time: float) -> int:
        """The queue for blocks last used at `time`; a new one where it is later, or earlier, than all before."""
        at = bisect_right(group.starts, time) - 1
        if at >= 0 and time <= group.newest:
            return group.queues[at]
        if len(group.starts) >= _CELLS:
            self._merge(group)
        at = 0 if at < 0 else len(group.starts)
        group.newest = max(group.newest, time)
        group.starts.insert(at, time)
        group.queues.insert(at, self._free_queues.pop() if self._free_queues else self._queues.new())
        return group.queues[at]

    def _merge(self, group: _Group) -> None:
        """Join the older cells two by two; the newest `_YOUNG` keep their places."""
        starts, queues = group.starts, group.queues
        older = (len(queues) - _YOUNG) // 2 * 2
        for at in range(0, older, 2):
            self._queues.join(queues[at], queues[at + 1])
            self._free_queues.append(queues[at + 1])
        del starts[1:older:2], queues[1:older:2]
