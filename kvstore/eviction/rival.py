"""What recency alone would have hit, counted beside the real store, and whether what it would hold has to be kept for a while.

Least-recently-used is a stack algorithm (Mattson et al., 1970): in room for n blocks it holds the n most recently used ones. So no second
store has to be simulated: known blocks are counted by the time of their last use, and whoever was used at or after the *cutoff*, where
the count from the newest on reaches n, would have been a hit; of the request where it does so, as many as there is room for, root first.
That costs a comparison a touched block, and agrees with a replay of `lru` to the block.

The account of both is kept in blocks and never forgets a loss. What the learnt order may lose is a share of all blocks asked for, some of
it in advance (more where it gains on `trial`), and what it gained before; it *risks* what it lacks: blocks that recency would hold and the
real store does not. Each of them can cost one hit at most, because chains are given up from their tails, and then it is there again. When
the risk has reached what may be lost, recency leads: blocks that it would hold are given up last, so that the store becomes recency's own
as its blocks come back, and the loss stays at about the bound, whatever the traffic. Most of what is lacking is never asked for while
recency would hold it; its share is observed, and the risk is that share of it. Nodes of a cluster keep one account: each tells the others
what it may lose and risks.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from math import inf, isfinite
from struct import Struct

from ..errors import InvalidInputError

#: Share of all blocks asked for that the learnt order may be behind.
_ALLOWED = 0.004
#: Mean requests of that which are allowed from the start, of one store: what the first 63 requests bring; and of each of several nodes,
#: whose trials show less: what a node has dropped comes to another next time.
_ADVANCED, _ADVANCED_OF_MANY = 0.25, 1.0
#: Share that is advanced, too, of what the learnt order has gained on trial, but no more than so many mean requests: all advances are
#: paid back by what the first 500 requests bring.
_LENT, _LENT_REQUESTS = 0.35, 1.75
#: A gain counts up to so many times what there is room for: all of that is at risk at most, and better times do not count for ever.
_SAVED_ROOMS = 4
#: What leads goes on leading until the risk is down to this share of what may be lost.
_CALM = 0.5
#: Weight of "all that is lacking will be asked for", in mean requests.
_WARY_REQUESTS = 16.0
#: Times that differ by less are one: ghosts remember theirs to a millisecond.
_SAME_S = 0.002
#: Rows kept before the cutoff, should the room grow.
_SPARE_ROWS = 256
_ACCOUNT = Struct("<2f")
ACCOUNT_BYTES = _ACCOUNT.size


class Rival:
    """Least-recently-used in as much room, and the account of it against the real store.

    Attributes
    ----------
    cutoff, edge, spare : float, float, int
        A block last used at `cutoff` or later would be held; of those at `edge` or later the ones above depth `spare`.
    leads : bool
        Whether what recency would hold is to be given up last.
    gained : int
        Blocks hit beyond what recency would have hit.
    watches : bool
        Whether recency never leads and is only counted; set by who owns this.
    """

    def __init__(self) -> None:
        self.watches = False
        self.cutoff = self.edge = -inf
        self.spare = 0
        self.leads = False
        # By time of the last use: the known blocks, those of them that left the store, and the length of the chain used then.
        self._times = array("d", [-inf])
        self._counts, self._gone, self._lengths = (array("q", [0]) for _ in range(3))
        self._first = 0  # row of the cutoff
        self._held = self._lacking = 0  # blocks in the rows from there on, and those of them that left the store
        self._room = 0
        self._asked = self._requests = 0
        self.gained = self._gained_on_trial = 0
        self._ahead = 0.0  # hits beyond recency's, and the share of what was asked that may be lost
        self._allowed = self._risk = 0.0  # what may be lost and what is at risk, when last compared
        self._others = 0.0, 0.0  # the same of other nodes
        self._advanced = _ADVANCED
        self._returned = self._expired = 0  # blocks once lacking that were asked for in time, and that recency would have dropped

    def left(self, time: float, blocks: int, gone: int = 0) -> None:
        """So many blocks that were last used at `time` are used again, or forgotten; so many of those that left are not gone any more."""
        if time + 2 * _SAME_S < self.edge:
            return  # surely before the cutoff, which most ghosts are
        row = bisect_right(self._times, time + _SAME_S) - 1
        if row + 1 < self._first:
            return
        gone = min(gone, self._gone[row])
        self._counts[row] -= blocks
        self._gone[row] -= gone
        self._returned += gone
        if row >= self._first:
            self._held -= blocks
            self._lacking -= gone

    def gone(self, time: float) -> bool:
        """A block last used at `time` leaves the store; True if the lead has changed hands."""
        if time < self.edge:
            return False
        row = bisect_right(self._times, time + _SAME_S) - 1
        self._gone[row] += 1
        if row >= self._first:
            self._lacking += 1
        return self._settle()

    def came(self, now: float, blocks: int, length: int) -> None:
        """So many blocks of a chain are used at `now`, no earlier than any before, the deepest of them `length` - 1 deep."""
        if now > self._times[-1]:
            self._times.append(now)
            for column in (self._counts, self._gone, self._lengths):
                column.append(0)
        if self._first == len(self._counts):
            self._first -= 1
            self._held, self._lacking = self._counts[-1], self._gone[-1]
            self._expired -= self._lacking
        self._counts[-1] += blocks
        self._held += blocks
        self._lengths[-1] = length
        self.fit(self._room)

    def fit(self, room: int) -> None:
        """The store has room for `room` blocks."""
        self._room = room
        counts, gone, first = self._counts, self._gone, self._first
        while self._held > room:
            self._held -= counts[first]
            self._lacking -= gone[first]
            self._expired += gone[first]
            first += 1
        while first and self._held + counts[first - 1] <= room:
            first -= 1
            self._held += counts[first]
            self._lacking += gone[first]
            self._expired -= gone[first]
        if first > 2 * _SPARE_ROWS:
            del self._times[:_SPARE_ROWS], counts[:_SPARE_ROWS], gone[:_SPARE_ROWS], self._lengths[:_SPARE_ROWS]
            first -= _SPARE_ROWS
        self._first = first
        times = self._times
        self.cutoff = times[first] - _SAME_S if first < len(times) else inf
        self.edge = times[first - 1] - _SAME_S if first else self.cutoff
        # What is left of the edge's chain is its deeper part: what was used again since stands in a later row.
        self.spare = self._lengths[first - 1] - self._beyond() if first else 0

    @property
    def lends(self) -> bool:
        """Whether a gain on trial could still change what may be lost."""
        return not self.watches and _ALLOWED * self._asked <= (self._advanced + _LENT_REQUESTS) * self._request

    def lend(self, gained: int) -> None:
        """On trial the learnt order has hit so many blocks beyond recency; counts from the next `judge` on."""
        self._gained_on_trial = gained

    def judge(self, asked: int, hits: int, rival_hits: int, begins: bool = True) -> bool:
        """Count a request for `asked` blocks, or a further part of one unless it `begins`; True if the lead has changed hands."""
        self._asked += asked
        self._requests += begins
        self.gained += hits - rival_hits
        self._ahead = min(self._ahead + hits - rival_hits + _ALLOWED * asked, _SAVED_ROOMS * self._room)
        return self._settle()

    def account(self) -> bytes:
        """What may be lost here and what is at risk, in blocks, for the other nodes of the cluster (`parse_account`)."""
        return _ACCOUNT.pack(self._allowed, self._risk)

    def heed(self, accounts: Sequence[tuple[float, float]]) -> None:
        """Keep one account with these other nodes, in place of those before: the bound is the cluster's."""
        self._others = sum(allowed for allowed, _ in accounts), sum(risk for _, risk in accounts)
        self._advanced = _ADVANCED_OF_MANY if accounts else _ADVANCED

    @property
    def _request(self) -> float:
        """Blocks of a mean request."""
        return self._asked / max(self._requests, 1)

    def _beyond(self) -> int:
        """Blocks of the edge's row that there is no room for."""
        return max(self._counts[self._first - 1] - (self._room - self._held), 0)

    def _settle(self) -> bool:
        """Compare what is at risk with what may be lost; True if the lead has changed hands."""
        if self.watches:
            return False
        request = self._request
        lacking = self._lacking
        if self._first:
            lacking += max(self._gone[self._first - 1] - self._beyond(), 0)
        wary = _WARY_REQUESTS * request
        self._risk = lacking * (self._returned + wary) / max(self._returned + self._expired + wary, 1.0)
        advanced = self._advanced * request + min(_LENT * max(self._gained_on_trial, 0), _LENT_REQUESTS * request)
        self._allowed = self._ahead + max(advanced - _ALLOWED * self._asked, 0.0)
        allowed, risk = self._others
        led = self.leads
        self.leads = self._risk + risk > (self._allowed + allowed) * (_CALM if led else 1.0)
        return self.leads != led


def parse_account(data: bytes) -> tuple[float, float]:
    """What `Rival.account` of another node said. Raises InvalidInputError for what no account can be."""
    if len(data) == ACCOUNT_BYTES:
        allowed, risk = _ACCOUNT.unpack(data)
        if isfinite(allowed) and 0.0 <= risk < inf:
            return allowed, risk
    raise InvalidInputError("another node's account of hits cannot be read")
