"""Which pages of the live cache are free, and how many hold on to each. No tensors.

Pages are numbered. A request's pages lie in a row where there is room, because a run of them can be read without gathering; so a new
request starts in a gap where both it and its neighbour can grow. It is the first such gap, not the widest: memory becomes the
process's own when it is first written to, and stays. For the same reason what is kept apart from requests lies at the far end, where
it does not come between them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from kvstore.errors import CapacityError

#: Pages left between two requests, at least, where that can be.
ROOM = 8


class Pages:
    """`total` pages with counts. All methods may be called from any thread.

    Conserves: every page is either free or held by at least one; `check` says so.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._holders = [0] * total
        self._free = total
        self._lock = threading.Lock()
        #: Called, from the thread that gave pages back, once they are free.
        self.on_free: Callable[[], None] = lambda: None

    @property
    def free(self) -> int:
        return self._free

    def take(self, count: int, after: int | None = None) -> list[int]:
        """`count` free pages with one holder each: a run, right behind page `after` if possible, else single ones.

        Raises
        ------
        CapacityError
            When fewer are free; none is taken then.
        """
        with self._lock:
            return self._take(count, after)

    def take_last(self, count: int) -> list[int]:
        """The last `count` free pages, in order, with one holder each. Raises CapacityError when fewer are free; none is taken then."""
        with self._lock:
            self._require(count, self._free)
            free = [page for page, holders in enumerate(self._holders) if not holders]
            return self._hold(free[len(free) - count :])

    def exchange(self, pages: Iterable[int], count: int) -> list[int]:
        """Give `pages` and take `count` in one go, so that nobody comes between. Raises CapacityError; nothing has changed then."""
        with self._lock:
            pages = list(pages)
            released = sum(self._holders[page] == 1 for page in pages)
            self._require(count, self._free + released)
            self._give(pages)
            taken = self._take(count, None)
        if released > count:
            self.on_free()
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each; they must be held already."""
        with self._lock:
            for page in pages:
                if not self._holders[page]:
                    raise ValueError(f"page {page} is free and cannot be shared")
                self._holders[page] += 1

    def give(self, pages: Iterable[int]) -> None:
        """One holder less for each; a page without one is free."""
        with self._lock:
            freed = self._give(pages)
        if freed:
            self.on_free()

    def check(self) -> bool:
        """Whether the counts agree."""
        with self._lock:
            return self._free == self._holders.count(0)

    def _take(self, count: int, after: int | None) -> list[int]:
        self._require(count, self._free)
        return self._hold(self._behind(after, count) or self._in_gap(count) or self._anywhere(count))

    def _require(self, count: int, free: int) -> None:
        if count > free:
            raise CapacityError(f"{count} pages of live cache are needed and {free} of {self.total} are free")

    def _hold(self, free: list[int]) -> list[int]:
        for page in free:
            self._holders[page] = 1
        self._free -= len(free)
        return free

    def _give(self, pages: Iterable[int]) -> int:
        """How many became free."""
        freed = 0
        for page in pages:
            if not self._holders[page]:
                raise ValueError(f"page {page} is free already")
            self._holders[page] -= 1
            freed += not self._holders[page]
        self._free += freed
        return freed

    def _behind(self, after: int | None, count: int) -> list[int]:
        start = self.total if after is None else after + 1
        return list(range(start, start + count)) if self._holders[start : start + count] == [0] * count else []

    def _in_gap(self, count: int) -> list[int]:
        """A run in the first gap that leaves as much room again on either side, else in the widest."""
        best_start, best_length, start, room = 0, 0, None, max(count, ROOM)
        for page, holders in enumerate([*self._holders, 1]):
            if holders and start is not None:
                if page - start > best_length:
                    best_start, best_length = start, page - start
                if best_length >= count + 2 * room:
                    break
                start = None
            elif not holders and start is None:
                start = page
        if best_length < count:
            return []
        start = best_start + min(room, best_length // 2, best_length - count) if best_start else 0
        return list(range(start, start + count))

    def _anywhere(self, count: int) -> list[int]:
        free = (page for page, holders in enumerate(self._holders) if not holders)
        return [page for page, _ in zip(free, range(count), strict=False)]
