"""All decisions of a node, without a tensor, a socket or a clock of its own (sans-I/O).

The server calls these methods from its event loop, one at a time, and moves the bytes itself. The law that holds between any two
calls, and that `check` verifies: used + reserved + free pages = pages of the arena, and no page has two owners.

Life of a put: `reserve` makes room and takes pages, the server writes and verifies them, `commit` makes the block visible or `abort`
gives the pages back. Life of a get: `find` finds what is there, `lease` holds it, the server copies and asks `intact` after each copy
whether the bytes were still the block's, `used` tells the policy, `holds.release` ends the lease. What a caller need not wait for,
`lease` and `settle`, may come after its answer, as long as nothing else is asked of the engine in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from operator import attrgetter

from kvstore.arena.pages import AccountingError, Extent, PageAllocator
from kvstore.block import BlockHeader
from kvstore.clock import Clock
from kvstore.errors import CapacityError, InvalidInputError
from kvstore.eviction.base import EvictionPolicy, Request

from .admission import Admission
from .config import MAX_LEASE_S, NodeConfig
from .holds import Holds
from .plans import Found, Overflow, Reservation, Tally, check_keys
from .quality import is_better
from .requests import Requests
from .status import Status
from .table import BlockTable, Entry, block_id, layer_pages

#: Reasons for dropping a block that its owner gave: no tier keeps it. A replaced block has its better one in the arena.
UNWANTED, REPLACED = ("request", "clear"), "replaced"
#: Rows of the index that one Get may have verified because their blocks are not here.
MAX_ABSENT = 64


class NodeEngine:
    """The node's state and every change of it.

    Parameters
    ----------
    config : NodeConfig
    clock : Clock
    policy : EvictionPolicy
    allocator : PageAllocator
    on_change : callable
        Told each key whose presence or fidelity changed, for the index.
    overflow : Overflow, optional
        Takes what the arena loses to pressure.
    marks : memoryview, optional
        The arena's, see `BlockTable`.

    A block's id is its key or, where callers have credentials, its key made its owner's own (`table.block_id`). Methods take ids.
    """

    def __init__(
        self, config: NodeConfig, clock: Clock, policy: EvictionPolicy, allocator: PageAllocator,
        on_change: Callable[[bytes], None] = lambda key: None, overflow: Overflow | None = None, marks: memoryview | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.clock = clock
        self.policy = policy
        self.requests = Requests(clock)
        self.allocator = allocator
        self.table = BlockTable(marks)
        self.admission = Admission(clock, policy, allocator, self.table, config.page_bytes, self._drop)
        self.tally = Tally()
        self.reserved_pages = 0
        self.changes = 0  # rises with every change of pages, so that idleness can be seen
        self.holds = Holds(config, allocator.pages * config.page_bytes, clock, policy, self.table)
        self._on_change = on_change
        self._overflow = overflow
        self._writing: dict[bytes, Reservation] = {}
        self._shown: list[tuple[Request, list[Entry]]] = []  # that policy and index have not heard of

    # ---- put

    def request(self, input_tokens: int = 0, after: bytes | None = None) -> Request:
        """The request of a user that a call belongs to, see `Requests.begin`."""
        return self.requests.begin(input_tokens, after)

    def reading(self, keys: Sequence[bytes], input_tokens: int) -> Request:
        """The same for a call that reads `keys`."""
        first = self.table.get(keys[0]) if keys else None
        return self.requests.begin(input_tokens, first and first.info.parent)

    def reserve(self, header: BlockHeader, request: Request, owner: str = "") -> Reservation | Status:
        """Take pages for a block of `owner`, making room if need be.

        Returns
        -------
        Reservation or Status
            A status says why the block is not wanted: ALREADY_EXISTS for one no better than the resident one (which is touched),
            BUSY while the same key is being written or the resident one is held, RESOURCE_EXHAUSTED when no room can be made,
            DATA_LOSS for a block without payload.
        """
        id = block_id(owner, header.key)
        if id in self._writing:
            return Status.BUSY
        resident = self.table.get(id)
        if resident is not None:
            if not is_better(header, resident.header):
                self._touch([resident], request)
                return Status.ALREADY_EXISTS
            if resident.holds:
                return Status.BUSY
        needs = layer_pages(header, self.config.page_bytes)
        total = sum(needs)
        if not total:  # it would cost no page, so their number would have no bound
            self.admission.told(header, request, owner)
            self.requests.used(request, [id])
            return Status.DATA_LOSS
        if total > self.allocator.pages:
            return self._reject("too_large")
        if self.reserved_pages and self.reserved_pages + total > self.allocator.pages // 2:
            return self._reject("writers")
        if refusal := self.admission.refusal(header, request, owner, total):
            return self._refuse(id, request, refusal)
        parent = self.table.get(block_id(owner, header.parent))
        if parent is not None:
            self.holds.take(parent)  # else the parent, a leaf until its child is here, could be the victim that makes room for it
        try:
            self.make_room(total)
        except BaseException as error:  # a policy that fails must not leave the parent held for ever
            if parent is not None:
                self.holds.give(parent)
            if not isinstance(error, CapacityError):
                raise
            return self._refuse(id, request, self.admission.refused(id, request, "no_room"))
        reservation = Reservation(id, owner, header, [self.allocator.alloc(count) for count in needs], request, parent)
        self._writing[id] = reservation
        self.changes += 1
        self.reserved_pages += total
        return reservation

    def reserve_run(self, headers: Iterable[BlockHeader], request: Request, owner: str = "") -> list[Reservation]:
        """Take pages for the leading blocks of a chain, as long as none is known here and all `can_wait`: nothing is to be decided then.

        What the answer ends before, the first perhaps, is for `reserve`.
        """
        needs: dict[bytes, tuple[BlockHeader, list[int]]] = {}  # by id
        left = room = min(self.allocator.free_pages, self.allocator.pages // 8 - self.reserved_pages)
        for header in headers:
            id, pages = block_id(owner, header.key), layer_pages(header, self.config.page_bytes)
            total = sum(pages)
            if total > left or not total or id in self._writing or id in needs or self.table.get(id) is not None:
                break
            if not needs and not self.admission.is_open(header, request, owner):
                break
            needs[id] = header, pages
            left -= total
        extents, run, at = self.allocator.alloc_all([count for _, pages in needs.values() for count in pages]), [], 0
        for id, (header, pages) in needs.items():
            self._writing[id] = reservation = Reservation(id, owner, header, extents[at : at + len(pages)], request, None)
            run.append(reservation)
            at += len(pages)
        if run and (parent := self.table.get(block_id(owner, run[0].header.parent))) is not None:
            run[0].parent = parent  # those of the others are in the run
            self.holds.take(parent)
        self.changes += len(run)
        self.reserved_pages += room - left
        return run

    def commit(self, reservation: Reservation) -> Status:
        """Make a written and verified block visible, unless a block as good came to be there in the meantime."""
        return self.commit_all([reservation])[0]

    def commit_all(self, reservations: Iterable[Reservation]) -> list[Status]:
        """The same for several, parents first: the policy hears once of all that belongs to one request."""
        statuses = self.show(reservations)
        self.settle()
        return statuses

    def show(self, reservations: Iterable[Reservation]) -> list[Status]:
        """As `commit_all`, but for what `settle` does."""
        runs = groupby(reservations, attrgetter("request"))
        return [status for request, run in runs for status in self._show(request, list(run))]

    def settle(self) -> list[Entry]:
        """Tell policy and index of the blocks that were shown; which they are."""
        shown, self._shown = self._shown, []
        for request, entries in shown:
            self.requests.used(request, [entry.id for entry in entries])
            self.policy.access(request, [entry.info for entry in entries])
            for entry in entries:
                self._change(entry.key)
        return [entry for _, entries in shown for entry in entries]

    def outcome(self, reservation: Reservation) -> Status:
        """What `show` would answer now for one that is written and verified."""
        resident = self.table.get(reservation.id)
        if resident is None:
            return Status.OK
        if not is_better(reservation.header, resident.header):
            return Status.ALREADY_EXISTS
        return Status.BUSY if resident.holds else Status.OK

    def can_wait(self, header: BlockHeader) -> bool:
        """Whether room for this block would be taken from nobody, so that those written before it may be committed with it."""
        pages = sum(layer_pages(header, self.config.page_bytes))
        few = 8 * (self.reserved_pages + pages) <= self.allocator.pages
        return few and pages <= self.allocator.free_pages and not self.admission.quotas.limits

    def abort(self, reservation: Reservation) -> None:
        """Give the pages of an unfinished or failed block back."""
        self._end_writing(reservation)
        self._free(reservation.layers)

    def make_room(self, pages: int) -> None:
        """Have the policy name victims, and drop or demote them, until `pages` are free.

        Raises
        ------
        CapacityError
            When all that is left is held; what was dropped until then stays dropped.
        """
        if self.allocator.free_pages < pages:
            self.holds.expire()
        while self.allocator.free_pages < pages:
            victim = self.policy.victim(self.clock.now())
            entry = None if victim is None else self.table.get(victim.id)
            if victim is None or entry is None or entry.holds:
                raise CapacityError("every block is pinned, leased or being written; retry, or raise --arena")
            # A floor that is newer than the block ends its ladder here: what may not stand lower goes.
            if victim.rung is None or entry.top - victim.rung < self.admission.floors.fidelity(entry.header, entry.owner):
                self._drop(entry, "pressure")
            else:
                self._demote(entry, victim.rung)

    # ---- get

    def lookup(self, keys: Sequence[bytes], lease_s: float = 0.0) -> tuple[list[Entry | None], int]:
        """Which blocks are here, and a lease on the longest run of them from the start that the bounds allow (0 for none)."""
        check_keys(keys)
        if not 0 <= lease_s <= MAX_LEASE_S:
            raise InvalidInputError(f"a lease lasts at most {MAX_LEASE_S:.0f} s, not {lease_s}")
        entries = [self.table.get(key) for key in keys]
        return entries, self.holds.lease([e for e in entries if e is not None], lease_s) if lease_s else 0

    def find(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """What is here of what a reader asks for; `lease` it before anything else happens, tell of it (`used`) when the reader has it."""
        check_keys(keys)
        entries = [self.table.get(key) for key in keys]
        for key in [key for key, entry in zip(keys, entries, strict=True) if entry is None][:MAX_ABSENT]:
            self._on_change(key)  # the index led the reader here: if its row is wrong, it goes
        return entries

    def lease(self, entries: Iterable[Entry | None]) -> int:
        """A lease on what was found, as far as the bounds allow; 0 for none."""
        return self.holds.lease([entry for entry in entries if entry is not None], self.config.get_hold_s)

    def used(self, entries: Iterable[Entry | None], request: Request) -> None:
        """Count a read of what was found as a use, of those blocks that are still here."""
        self._touch([entry for entry in entries if entry is not None and self.table.get(entry.id) is entry], request)

    def intact(self, found: Found) -> bool:
        """Whether bytes copied until now from `found` are the block's."""
        return found.entry.generation == found.generation

    # ---- dropping

    def evict(self, keys: Sequence[bytes], reason: str = "request") -> list[Status]:
        """Drop blocks, children or not; BUSY for those that are held."""
        check_keys(keys)
        self.holds.expire()
        return [self._evict(key, reason) for key in keys]

    # ---- account

    @property
    def arena_bytes(self) -> int:
        return self.allocator.pages * self.config.page_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of pages that hold visible blocks."""
        return self.table.pages * self.config.page_bytes

    @property
    def free_bytes(self) -> int:
        return self.allocator.free_pages * self.config.page_bytes

    @property
    def reserved_bytes(self) -> int:
        return self.reserved_pages * self.config.page_bytes

    def check_sums(self) -> None:
        """Verify the law on the sums that are kept: used + reserved + free = arena; O(1).

        Raises
        ------
        AccountingError
            If it does not hold: a bug, and reason enough not to trust this node.
        """
        if (table := self.table.pages) + self.reserved_pages != (used := self.allocator.used_pages):
            raise AccountingError(f"{used} pages are allocated; blocks have {table} and writers {self.reserved_pages}")

    def check(self) -> None:
        """Verify the account down to each page, and the holds; O(n log n) in the number of blocks. Raises like `check_sums`."""
        self.check_sums()
        self.allocator.check()
        self.table.check(self.holds.leases.holds + len(self.holds.pins) + sum(r.parent is not None for r in self._writing.values()))
        if (reserved := sum(r.pages for r in self._writing.values())) != self.reserved_pages:
            raise AccountingError(f"writers hold {reserved} pages, the sum says {self.reserved_pages}")

    # ---- steps

    def _change(self, key: bytes) -> None:
        self.changes += 1
        self._on_change(key)

    def _reject(self, reason: str) -> Status:
        self.tally.rejected[reason] += 1
        return Status.RESOURCE_EXHAUSTED

    def _refuse(self, id: bytes, request: Request, reason: str) -> Status:
        """As `_reject`; calls with what follows the block belong to its request all the same."""
        self.requests.used(request, [id])
        return self._reject(reason)

    def _touch(self, entries: Sequence[Entry], request: Request) -> None:
        """Tell the policy of a use: each block once and root first, in whatever order and how often the caller named them."""
        if entries:
            once = sorted(dict.fromkeys(entries), key=lambda entry: entry.header.start)
            for entry in once:
                entry.last_use = max(entry.last_use, request.now)
            self.requests.used(request, [entry.id for entry in once])
            self.policy.access(request, [entry.info for entry in once])

    def _evict(self, key: bytes, reason: str) -> Status:
        entry = self.table.get(key)
        if entry is None:
            if key in self._writing:
                return Status.BUSY
            return Status.OK if self._overflow is not None and self._overflow.forget(key) else Status.NOT_FOUND
        if entry.holds:
            return Status.BUSY
        self._drop(entry, reason)
        return Status.OK

    def _drop(self, entry: Entry, reason: str) -> None:
        if self._overflow is not None:
            if reason in UNWANTED:
                self._overflow.forget(entry.id)
            elif reason != REPLACED:
                self._overflow.keep(entry)
        self.admission.quotas.count(entry, -entry.pages * self.config.page_bytes)
        self.allocator.free(self.table.remove(entry))
        self.policy.removed(entry.id)
        self.tally.evictions[reason] += 1
        self._change(entry.key)

    def _demote(self, entry: Entry, rung: int) -> None:
        before, after = entry.header.present, entry.top - rung
        if self._overflow is not None:
            self._overflow.keep(entry)
        dropped = self.table.truncate(entry, after)
        self.admission.quotas.count(entry, -sum(extent.count for extent in dropped) * self.config.page_bytes)
        self.allocator.free(dropped)
        self.policy.demoted(entry.id, rung)
        self.tally.demotions[before, after] += before - after
        self._change(entry.key)

    def _show(self, request: Request, run: Sequence[Reservation]) -> list[Status]:
        statuses, entries, now = [], [], self.clock.now()
        for reservation in run:
            self._end_writing(reservation)
            statuses.append(status := self.outcome(reservation))
            if status is Status.OK:
                if (resident := self.table.get(reservation.id)) is not None:
                    self._drop(resident, REPLACED)
                header, owner = reservation.header, reservation.owner
                entries.append(self.table.insert(header, reservation.layers, now, self.admission.info(header, owner), owner))
            else:
                self._free(reservation.layers)
        if entries:
            self.admission.quotas.came(entries, self.config.page_bytes)
            self._shown.append((request, entries))
        return statuses

    def _end_writing(self, reservation: Reservation) -> None:
        if self._writing.get(reservation.id) is not reservation:
            raise AccountingError("a reservation was ended twice")
        del self._writing[reservation.id]
        self.changes += 1
        self.reserved_pages -= reservation.pages
        if reservation.parent is not None:
            self.holds.give(reservation.parent)

    def _free(self, layers: Iterable[tuple[Extent, ...]]) -> None:
        for layer in layers:
            self.allocator.free(layer)
