"""What recency alone would have hit, counted beside the real store, and whether it should lead for a while.

Least-recently-used is a stack algorithm (Mattson et al., 1970): in room for n blocks it holds the n most recently used ones. So no second
store has to be simulated: known blocks are counted by the time of their last use, and whoever was used at or after the *cutoff*, where
the count from the newest on reaches n, would have been a hit; of the request where it does so, as many as there is room for, root first.
That costs a comparison a touched block.

The account of both is kept in blocks, and forgets in the course of some hundred requests. When the real store is behind by a few
requests' worth, recency leads; after a while the learnt order gets another chance, and each time that it loses this in vain it waits
twice as long for the next. So what learning may cost against recency is bounded, whatever the traffic: a few requests' worth for each
doubling of their number.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right

#: How far the learnt order may be behind, in mean requests; in a later chance half of that.
_ALLOWED_REQUESTS = 2.4
#: Share of the account that a request forgets.
_FORGET = 1 / 400
#: Requests until the first other chance.
_FIRST_WAIT = 64
#: Times that differ by less are one: ghosts remember theirs to a millisecond.
_SAME_S = 0.002
#: Rows kept before the cutoff, should the room grow.
_SPARE_ROWS = 256


class Rival:
    """Least-recently-used in as much room, and the account of it against the real store.

    Attributes
    ----------
    cutoff, edge, spare : float, float, int
        A block last used at `cutoff` or later would be held; of those at `edge` or later the first `spare` of a chain.
    leads : bool
        Whether recency should choose what leaves.
    """

    def __init__(self) -> None:
        self.cutoff = self.edge = float("-inf")
        self.spare = 0
        self.leads = False
        self._times = array("d", [float("-inf")])
        self._counts = array("q", [0])
        self._first = 0  # row of the cutoff
        self._held = 0  # blocks in the rows from there on
        self._asked = 0
        self._requests = 0
        self._ahead = 0.0
        self._wait, self._next_wait = 0, _FIRST_WAIT

    def left(self, time: float, blocks: int) -> None:
        """So many blocks that were last used at `time` are used again, or forgotten."""
        if time + 2 * _SAME_S < self.cutoff:
            return  # surely before the cutoff, which most ghosts are
        row = bisect_right(self._times, time + _SAME_S) - 1
        if row >= self._first:
            self._counts[row] -= blocks
            self._held -= blocks

    def came(self, now: float, blocks: int, room: int) -> None:
        """So many blocks are used at `now`, no earlier than any before; the store has room for `room` blocks."""
        if now > self._times[-1]:
            self._times.append(now)
            self._counts.append(0)
        counts = self._counts
        if self._first == len(counts):
            self._first -= 1
            self._held = counts[-1]
        counts[-1] += blocks
        self._held += blocks
        while self._held > room:
            self._held -= counts[self._first]
            self._first += 1
        while self._first and self._held + counts[self._first - 1] <= room:
            self._first -= 1
            self._held += counts[self._first]
        if self._first > 2 * _SPARE_ROWS:
            del self._times[:_SPARE_ROWS], counts[:_SPARE_ROWS]
            self._first -= _SPARE_ROWS
        times, first = self._times, self._first
        self.cutoff = times[first] - _SAME_S if first < len(times) else float("inf")
        self.edge = times[first - 1] - _SAME_S if first else self.cutoff
        self.spare = room - self._held

    def judge(self, asked: int, hits: int, rival_hits: int, begins: bool = True) -> bool:
        """Count a request for `asked` blocks, or a further part of one unless it `begins`; True if the lead has changed hands."""
        self._asked += asked
        self._requests += begins
        allowed = _ALLOWED_REQUESTS * self._asked / max(self._requests, 1)
        if self.leads:
            self._wait -= begins
            self._ahead = -allowed / 2
            self.leads = self._wait > 0
            return not self.leads
        self._ahead += hits - rival_hits - self._ahead * _FORGET * begins
        if self._ahead > allowed:
            self._next_wait = _FIRST_WAIT
        elif self._ahead < -allowed:
            self.leads = True
            self._wait, self._next_wait = self._next_wait, 2 * self._next_wait
        return self.leads
