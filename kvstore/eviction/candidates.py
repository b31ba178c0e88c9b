"""Candidates for the next step down, in groups of one value curve, each ordered by the time of the last use.

A group is a list of at most `_CELLS` cells, each a linked queue of blocks that were last used at about the same time; when there are
too many, the older ones are joined two by two, so cells of old blocks span more time. So a block costs two links and the number of its
group, whatever the number of groups, and finding, adding and removing one takes a binary search among the cells. Both ends of a group are
candidates, its least and its most recently used block: when a working set is larger than the store, recency alone throws out just
what comes back next.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from heapq import heappop, heappush, heapreplace

from .ladder import Step
from .reuse import EDGES_S

#: Of blocks alike in class and age the deeper is worth less, by half at this depth: over many nodes a chain is then given up from its tail.
DEPTH_SCALE = 3000.0
_CELLS, _YOUNG = 48, 16
#: More than any block costs by its curve: what is kept is worth that times 1 / (age + 1 s).
_KEPT = 1e9
_NONE = -1


class _Cell:
    """A queue of slots: the first and the last of them. No cell of a group is empty but for a moment."""

    __slots__ = ("head", "tail")

    def __init__(self) -> None:
        self.head = self.tail = _NONE


class _Group:
    """Cells by time, and where each starts. `newest` is the latest time that was ever added.

    `old` and `young` are the ends when the group was last priced, in which `round` of prices, and what they cost; `price` is that of
    the cheaper one, `end`, infinite where there is none. `curve` and `step` are what the owner says of `key`, the curve None until it
    is asked; `rate` is what blocks last used at `time` are worth before their depth counts.
    """

    __slots__ = (
        "cells", "curve", "end", "key", "newest", "number", "old", "old_price", "price", "rate", "round", "starts", "step", "time",
        "young", "young_price",
    )  # fmt: skip

    def __init__(self, key: int, number: int) -> None:
        self.key, self.number = key, number
        self.newest = float("-inf")
        self.starts: list[float] = []
        self.cells: list[_Cell] = []
        self.round = 0
        self.old = self.young = self.end = _NONE
        self.old_price = self.young_price = self.rate = 0.0
        self.price = float("inf")
        self.curve: Sequence[float] | None = None
        self.step = Step(None, 0.0)
        self.time: float | None = None


class Candidates:
    """Groups of candidates, and the cheapest of their ends.

    Parameters
    ----------
    curve : callable
        ``curve(key)``: values of the blocks of a group by age bucket, and the next step of each.
    last_used : array of float
        Seconds, by slot; must not change while a slot stands here.
    depth : sequence of int
        By slot.
    refresh_s : float
        Prices of groups that nothing happened to are kept for this long.

    Attributes
    ----------
    listed : list
        By slot: the group that it stands in, None where it does not stand here.
    kept_from : float
        To drop a block last used at this time or later costs more than all else, the longer ago the less; to demote it does not.
    """

    def __init__(
        self, curve: Callable[[int], tuple[Sequence[float], Step]], last_used: array[float], depth: Sequence[int], refresh_s: float = 0.5
    ) -> None:
        self.listed: list[_Group | None] = []
        self._curve = curve
        self._last_used = last_used
        self._depth = depth
        self._refresh_s = refresh_s
        self._before = array("i")
        self._after = array("i")
        self._groups: list[_Group] = []
        self._by_key: dict[int, _Group] = {}
        self._leader = _Group(_NONE, _NONE)  # the cheapest when last asked; most often it is the next time too
        self._heap: list[tuple[float, int]] = []  # price and number of the other groups, and of some at former prices
        self._dirty: set[_Group] = set()
        self._priced_at = float("-inf")
        self.kept_from = float("inf")
        self._round, self._round_at = 1, float("-inf")

    def reserve(self, slots: int) -> None:
        """Make room for slots below `slots`."""
        missing = slots - len(self.listed)
        self.listed.extend([None] * missing)
        self._before.extend([_NONE] * missing)
        self._after.extend([_NONE] * missing)

    def add(self, key: int, slots: Sequence[int]) -> None:
        """List `slots`, none of which is listed and which were last used at one time, in the group `key`, one after the other."""
        group = self._by_key.get(key)
        if group is None:
            group = self._by_key[key] = _Group(key, len(self._groups))
            self._groups.append(group)
        self._dirty.add(group)
        if group.old in slots or group.young in slots:
            group.round = 0  # it comes back, perhaps with another price
        time = self._last_used[slots[0]]
        self._link(group.cells[-1] if time == group.newest and group.cells else self._cell(group, time), slots, time)
        for slot in slots:
            self.listed[slot] = group

    def remove(self, slot: int) -> None:
        """Take `slot` out of its group if it is listed."""
        group = self.listed[slot]
        if group is None:
            return
        self.listed[slot] = None
        self._dirty.add(group)
        at = self._unlink(group, slot)
        if group.cells[at].head < 0:
            del group.starts[at], group.cells[at]

    def replace(self, slot: int, other: int) -> None:
        """The same as `remove` of `slot`, which is listed, and `add` to its group of `other`, which is not and was last used with it."""
        group, time = self.listed[slot], self._last_used[slot]
        self.listed[slot], self.listed[other] = None, group
        self._dirty.add(group)
        if other == group.old or other == group.young:
            group.round = 0
        at = self._unlink(group, slot)
        cell = group.cells[at]
        if cell.head < 0:
            if at:
                del group.starts[at], group.cells[at]
                cell = group.cells[at - 1]
            else:
                group.starts[0] = time
        self._link(cell, (other,), time)

    def _unlink(self, group: _Group, slot: int) -> int:
        """Take `slot` out of its cell, which may be left empty; which of the group's cells that is."""
        cells = group.cells
        if cells[0].head == slot:  # most often: it was the cheapest
            at = 0
        else:
            at = bisect_right(group.starts, self._last_used[slot]) - 1
            if at < 0:
                at = 0
        cell, before, after = cells[at], self._before[slot], self._after[slot]
        if before >= 0:
            self._after[before] = after
        else:
            cell.head = after
        if after >= 0:
            self._before[after] = before
        else:
            cell.tail = before
        return at

    def _link(self, cell: _Cell, slots: Sequence[int], time: float) -> None:
        """Put `slots`, last used at `time`, one by one at the end of a cell, or in front where the last one there is younger."""
        before, after, end = self._before, self._after, cell.tail
        if end < 0 or self._last_used[end] <= time:
            for slot in slots:
                before[slot], after[slot] = end, _NONE
                if end < 0:
                    cell.head = slot
                else:
                    after[end] = slot
                end = slot
            cell.tail = end
            return
        end = cell.head
        for slot in slots:
            before[slot], after[slot] = _NONE, end
            before[end] = end = slot
        cell.head = end

    def stale(self) -> None:
        """The curves changed: all groups are priced afresh at the next `cheapest`."""
        self._priced_at = self._round_at = float("-inf")
        for group in self._groups:
            group.curve = None

    def cheapest(self, now: float) -> tuple[float, int, Step] | None:
        """Price, slot and next step of the cheapest end of any group; None when nothing is listed."""
        heap, groups, leader = self._heap, self._groups, self._leader
        if now != self._round_at:
            self._round, self._round_at = self._round + 1, now
        if now - self._priced_at >= self._refresh_s:
            self._priced_at = now
            self._dirty.update(groups)
        if self._dirty:
            self._reprice(now)
        while heap:
            price, number = heap[0]
            if price > leader.price:
                break
            group = groups[number]
            if price != group.price:
                heappop(heap)  # the group was priced again since
                continue
            if price < leader.price or number < leader.number:
                if leader.cells:
                    heapreplace(heap, (leader.price, leader.number))
                else:
                    heappop(heap)
                self._leader = leader = group
            break
        return (leader.price, leader.end, leader.step) if leader.cells else None

    def _reprice(self, now: float) -> None:
        """Price the groups whose ends may have changed."""
        heap, leader, round, grown = self._heap, self._leader, self._round, False
        for group in self._dirty:
            if not group.cells:
                group.price = float("inf")
                continue
            oldest, youngest = group.cells[0].head, group.cells[-1].tail
            if group.round != round:
                group.round, group.time = round, None
                group.old = group.young = _NONE
            if group.old != oldest:
                group.old, group.old_price = oldest, self._price(group, oldest, now)
            if group.young != youngest:
                group.young = youngest
                group.young_price = group.old_price if youngest == oldest else self._price(group, youngest, now)
            young = group.young_price < group.old_price
            group.end, price = (youngest, group.young_price) if young else (oldest, group.old_price)
            if price != group.price:
                group.price = price
                if group is not leader:
                    heappush(heap, (price, group.number))
                    grown = True
        self._dirty.clear()
        if grown and len(heap) > 8 * len(self._groups) + 256:
            heap[:] = sorted((group.price, group.number) for group in self._groups if group.cells and group is not leader)

    def _price(self, group: _Group, slot: int, now: float) -> float:
        """Value of the next step of the block in `slot`."""
        time = self._last_used[slot]
        if time != group.time:
            group.time, group.rate = time, self._rate(group, now - time)
        if time >= self.kept_from and group.step.rung is None:
            return _KEPT * group.step.loss / (now - time + 1.0)
        return group.rate / (DEPTH_SCALE + self._depth[slot])

    def _rate(self, group: _Group, age_s: float) -> float:
        if group.curve is None:
            group.curve, group.step = self._curve(group.key)
        return group.curve[bisect_right(EDGES_S, age_s) - 1] * group.step.loss * DEPTH_SCALE

    def _cell(self, group: _Group, time: float) -> _Cell:
        """The cell for blocks last used at `time`; a new one where it is later, or earlier, than all before."""
        if time <= group.newest:
            at = bisect_right(group.starts, time) - 1
            if at >= 0:
                return group.cells[at]
        if len(group.starts) >= _CELLS:
            self._merge(group)
        at = 0 if time <= group.newest else len(group.starts)
        if time > group.newest:
            group.newest = time
        cell = _Cell()
        group.starts.insert(at, time)
        group.cells.insert(at, cell)
        return cell

    def _merge(self, group: _Group) -> None:
        """Join the older cells two by two; the newest `_YOUNG` keep their places."""
        starts, cells = group.starts, group.cells
        older = (len(cells) - _YOUNG) // 2 * 2
        for at in range(0, older, 2):
            cell, other = cells[at], cells[at + 1]
            self._after[cell.tail], self._before[other.head] = other.head, cell.tail
            cell.tail = other.tail
        del starts[1:older:2], cells[1:older:2]
