"""Which pages of an arena are free: exact counts, no tensors.

Free runs are kept by their length, so an allocation takes the shortest run that is long enough (best fit) in O(log of the number
of different lengths), and a freed run merges with its neighbours in O(1). No state is kept per page: an arena of many GiB costs
what its blocks cost. The best-fit free list with boundary tags is Knuth, TAOCP vol. 1, §2.5.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvstore.errors import CapacityError, ConcertinaError, ConfigError


class Extent(NamedTuple):
    """A run of pages: the first one and how many."""

    start: int
    count: int


class AccountingError(ConcertinaError):
    """The account of pages does not add up, or a page was freed that was not allocated: a bug of ours, never the caller's."""

    reason = "ACCOUNTING"


class PageAllocator:
    """Hands out pages 0 … `pages` - 1 in runs as long as possible.

    Parameters
    ----------
    pages : int
        Number of pages, at least 1.
    """

    def __init__(self, pages: int) -> None:
        if pages < 1:
            raise ConfigError(f"an arena needs at least one page, not {pages}; raise --arena")
        self.pages = pages
        self.free_pages = 0
        self._allocated: dict[int, int] = {}
        self._count_at: dict[int, int] = {}  # start of a free run -> its length
        self._start_before: dict[int, int] = {}  # page after a free run -> its start
        self._runs: dict[int, dict[int, None]] = {}  # length -> starts, in order of arrival, so that replays agree
        self._lengths: list[int] = []  # the keys of `_runs`, sorted
        self._insert(0, pages)

    @property
    def used_pages(self) -> int:
        return self.pages - self.free_pages

    def alloc(self, count: int) -> tuple[Extent, ...]:
        """Take `count` pages: one run if any is long enough, else the longest ones.

        Raises
        ------
        CapacityError
            If fewer than `count` pages are free; nothing is taken then.
        """
        if count < 0:
            raise AccountingError(f"cannot allocate {count} pages")
        if count > self.free_pages:
            raise CapacityError(f"{count} pages are needed and {self.free_pages} are free")
        taken: list[Extent] = []
        while count:
            at = bisect_left(self._lengths, count)
            length = self._lengths[min(at, len(self._lengths) - 1)]
            start = next(reversed(self._runs[length]))
            self._remove(start, length)
            extent = Extent(start, min(length, count))
            if length > extent.count:
                self._insert(start + extent.count, length - extent.count)
            self._allocated[start] = extent.count
            taken.append(extent)
            count -= extent.count
        return tuple(taken)

    def alloc_all(self, counts: Sequence[int]) -> list[tuple[Extent, ...]]:
        """`alloc` for each of `counts`: out of one run, side by side, where one is long enough for all.

        Raises
        ------
        CapacityError
            If fewer pages are free than all of them need; nothing is taken then.
        """
        total = sum(counts)
        if total > self.free_pages:
            raise CapacityError(f"{total} pages are needed and {self.free_pages} are free")
        at = bisect_left(self._lengths, total)
        if at == len(self._lengths) or min(counts, default=0) < 1:
            return [self.alloc(count) for count in counts]
        length = self._lengths[at]
        start = next(reversed(self._runs[length]))
        self._remove(start, length)
        if length > total:
            self._insert(start + total, length - total)
        taken = []
        for count in counts:
            self._allocated[start] = count
            taken.append((Extent(start, count),))
            start += count
        return taken

    def free(self, extents: Iterable[Extent]) -> None:
        """Give back extents exactly as `alloc` gave them.

        Raises
        ------
        AccountingError
            For an extent that is not allocated (a double free); those before it in `extents` are freed.
        """
        for start, count in extents:
            if self._allocated.get(start) != count:
                raise AccountingError(f"pages {start} … {start + count - 1} were freed but are not allocated")
            del self._allocated[start]
            before = self._start_before.get(start)
            if before is not None:
                length = self._count_at[before]
                self._remove(before, length)
                start, count = before, count + length
            after = self._count_at.get(start + count)
            if after is not None:
                self._remove(start + count, after)
                count += after
            self._insert(start, count)

    def check(self) -> None:
        """Verify that every page is in exactly one free run or one allocated extent; O(n log n) in their number.

        Raises
        ------
        AccountingError
            If that does not hold.
        """
        at = 0
        for start, count in sorted([*self._allocated.items(), *self._count_at.items()]):
            if start != at or count < 1:
                raise AccountingError(f"pages {at} … {start} are in no run, or in two")
            at = start + count
        if at != self.pages or sum(self._count_at.values()) != self.free_pages:
            raise AccountingError(f"{at} of {self.pages} pages are accounted for, {self.free_pages} are said to be free")

    def _insert(self, start: int, count: int) -> None:
        self._count_at[start] = count
        self._start_before[start + count] = start
        if count not in self._runs:
            self._runs[count] = {}
            insort(self._lengths, count)
        self._runs[count][start] = None
        self.free_pages += count

    def _remove(self, start: int, count: int) -> None:
        del self._count_at[start], self._start_before[start + count]
        starts = self._runs[count]
        del starts[start]
        if not starts:
            del self._runs[count]
            del self._lengths[bisect_left(self._lengths, count)]
        self.free_pages -= count
