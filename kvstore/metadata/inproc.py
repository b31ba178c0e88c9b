"""Metadata inside one process: for tests, and for simulating a whole cluster on an injected clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore.clock import Clock, SystemClock
from kvstore.errors import DeadlineError, TransportError

from .base import (
    MAX_HOLDERS,
    NODE_TTL_S,
    IndexEntry,
    Location,
    Metadata,
    NodeRecord,
    WorkerRecord,
    check_incarnation,
    check_keys,
    check_value,
    newest_by_place,
)


@dataclass(slots=True)
class InprocState:
    """What the backend would hold; share one among several `InprocMetadata` to let them see each other.

    `away` and `slow` make every call fail as a backend that is gone, or that answers too late, would.
    """

    holders: dict[bytes, dict[str, Location]] = field(default_factory=dict)
    nodes: dict[str, tuple[float, NodeRecord]] = field(default_factory=dict)
    workers: dict[str, tuple[float, WorkerRecord]] = field(default_factory=dict)
    values: dict[str, tuple[float, bytes]] = field(default_factory=dict)
    claims: dict[bytes, float] = field(default_factory=dict)
    away: bool = False
    slow: bool = False

    def lose(self) -> None:
        """Forget everything, as a backend without persistence does when it restarts."""
        for table in (self.holders, self.nodes, self.workers, self.values):
            table.clear()


class InprocMetadata(Metadata):
    """See `Metadata`; expiry follows `clock`."""

    def __init__(self, clock: Clock | None = None, state: InprocState | None = None) -> None:
        self.clock = clock or SystemClock()
        self.state = state or InprocState()

    def _reach(self) -> InprocState:
        if self.state.away:
            raise TransportError("the metadata store is away")
        if self.state.slow:
            raise DeadlineError("the metadata store did not answer in time")
        return self.state

    async def announce(self, incarnation: str, entries: Sequence[IndexEntry]) -> None:
        check_incarnation(incarnation)
        check_keys(entry.key for entry in entries)
        holders = self._reach().holders
        for entry in entries:
            others = {i: place for i, place in holders.get(entry.key, {}).items() if i != incarnation}
            newest = {incarnation: Location(incarnation, entry.size_bytes, entry.fidelity), **others}
            holders[entry.key] = dict(list(newest.items())[:MAX_HOLDERS])

    async def withdraw(self, incarnation: str, keys: Sequence[bytes]) -> None:
        check_incarnation(incarnation)
        check_keys(keys)
        holders = self._reach().holders
        for key in keys:
            holders.get(key, {}).pop(incarnation, None)
            if not holders.get(key, True):
                del holders[key]

    async def locate(self, keys: Sequence[bytes]) -> list[tuple[Location, ...]]:
        check_keys(keys)
        holders = self._reach().holders
        return [tuple(holders.get(key, {}).values()) for key in keys]

    async def scan(self, cursor: int, limit: int) -> tuple[list[tuple[bytes, tuple[Location, ...]]], int]:
        holders = self._reach().holders
        keys = sorted(holders)
        part = [(key, tuple(holders[key].values())) for key in keys[cursor : cursor + limit]]
        return part, cursor + limit if cursor + limit < len(keys) else 0

    async def heartbeat(self, record: NodeRecord, ttl_s: float = NODE_TTL_S) -> bool:
        check_incarnation(record.incarnation)
        nodes, now = self._reach().nodes, self.clock.now()
        known = record.incarnation in nodes and nodes[record.incarnation][0] > now
        nodes[record.incarnation] = (now + ttl_s, record)
        return known

    async def leave(self, record: NodeRecord) -> None:
        self._reach().nodes.pop(record.incarnation, None)

    async def nodes(self) -> list[NodeRecord]:
        return newest_by_place(self._living(self._reach().nodes))

    async def heartbeat_worker(self, record: WorkerRecord, ttl_s: float = NODE_TTL_S) -> None:
        self._reach().workers[record.id] = (self.clock.now() + ttl_s, record)

    async def leave_worker(self, worker_id: str) -> None:
        self._reach().workers.pop(worker_id, None)

    async def workers(self) -> list[WorkerRecord]:
        return sorted(self._living(self._reach().workers), key=lambda r: r.id)

    def _living(self, table: dict) -> list:
        """The records of `table` whose time has not passed; the others are forgotten."""
        now = self.clock.now()
        for name in [name for name, (until, _) in table.items() if until <= now]:
            del table[name]
        return [record for _, record in table.values()]

    async def set_value(self, name: str, value: bytes, ttl_s: float | None = None) -> None:
        check_value(name, value)
        self._reach().values[name] = (math.inf if ttl_s is None else self.clock.now() + ttl_s, bytes(value))

    async def get_value(self, name: str) -> bytes | None:
        until, value = self._reach().values.get(name, (math.inf, None))
        return value if until > self.clock.now() else None

    async def claim(self, keys: Sequence[bytes], ttl_s: float) -> list[bool]:
        check_keys(keys)
        claims, now = self._reach().claims, self.clock.now()
        free = [claims.get(key, -math.inf) <= now for key in keys]
        claims.update((key, now + ttl_s) for key, ours in zip(keys, free, strict=True) if ours)
        return free

    async def unclaim(self, keys: Sequence[bytes]) -> None:
        check_keys(keys)
        for key in keys:
            self._reach().claims.pop(key, None)

    async def close(self) -> None:
        """Nothing to give back."""
