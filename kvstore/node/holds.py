"""Which blocks must stay where they are: under a lease, pinned, or the parent of a block that is being written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvstore.arena.pages import AccountingError
from kvstore.clock import Clock
from kvstore.errors import InvalidInputError
from kvstore.eviction.base import EvictionPolicy

from .config import MAX_PIN_S, NodeConfig
from .leases import LeaseTable, PinTable
from .plans import check_keys
from .status import Status
from .table import BlockTable, Entry


class Holds:
    """Counts the reasons for which each block is held. The policy hears of the first and of the end of the last.

    Parameters
    ----------
    config : NodeConfig
    arena_bytes : int
        Of which leases and pins may each hold a share.
    clock, policy, table
        The engine's own.
    """

    def __init__(self, config: NodeConfig, arena_bytes: int, clock: Clock, policy: EvictionPolicy, table: BlockTable) -> None:
        self.leases = LeaseTable(config.max_leases, int(arena_bytes * config.lease_share), clock.rng)
        self.pins = PinTable(int(arena_bytes * config.pin_share))
        self._page_bytes = config.page_bytes
        self._clock = clock
        self._policy = policy
        self._table = table

    def take(self, entry: Entry) -> None:
        """One reason more."""
        entry.holds += 1
        if entry.holds == 1:
            self._policy.hold(entry.id)

    def give(self, entry: Entry) -> None:
        """One reason less."""
        entry.holds -= 1
        if entry.holds == 0:
            self._policy.release(entry.id)

    def lease(self, entries: Sequence[Entry], lease_s: float) -> int:
        """A lease on the longest run of `entries` from the start that the bounds allow, 0 for none."""
        self.expire()
        sizes = [(entry.id, entry.pages * self._page_bytes) for entry in entries]
        lease, keys = self.leases.grant(sizes, self._clock.now() + lease_s)
        for entry, _ in zip(entries, keys, strict=False):
            self.take(entry)
        return lease

    def release(self, lease: int) -> None:
        """End a lease; nothing happens if it is not known."""
        self._give_all(self.leases.release(lease))

    def pin(self, keys: Sequence[bytes], ttl_s: int) -> list[Status]:
        """Keep blocks for `ttl_s` seconds; RESOURCE_EXHAUSTED for those that the bound on pinned bytes forbids."""
        check_keys(keys)
        if not 1 <= ttl_s <= MAX_PIN_S:
            raise InvalidInputError(f"ttl_seconds must be from 1 to {MAX_PIN_S}, not {ttl_s}")
        return [self._pin(key, self._clock.now() + ttl_s) for key in keys]

    def unpin(self, keys: Sequence[bytes]) -> list[Status]:
        """End pins; NOT_FOUND where there is none."""
        check_keys(keys)
        ended = [self.pins.unpin(key) for key in keys]
        self._give_all(key for key, was in zip(keys, ended, strict=True) if was)
        return [Status.OK if was else Status.NOT_FOUND for was in ended]

    def expire(self) -> None:
        """End the leases and pins that are over."""
        now = self._clock.now()
        self._give_all(self.leases.expire(now))
        self._give_all(self.pins.expire(now))

    def _pin(self, key: bytes, until: float) -> Status:
        entry = self._table.get(key)
        if entry is None:
            return Status.NOT_FOUND
        new = self.pins.pin(key, entry.pages * self._page_bytes, until)
        if new:
            self.take(entry)
        return Status.RESOURCE_EXHAUSTED if new is None else Status.OK

    def _give_all(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            if (entry := self._table.get(key)) is None:
                raise AccountingError("a held block is not resident")
            self.give(entry)
