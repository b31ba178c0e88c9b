"""Keeps the cluster's metadata in step with a node: heartbeats, and a bounded, coalescing queue of changes to the index.

Nothing here is on the path of a Get or Put. While the metadata is away the node serves on and changes collect, one place a key; when
there are too many of them, or the metadata has lost its state, the whole table is announced again, a slice at a time.

A loss can pass unnoticed: a replica takes over that knows the last heartbeat and not what came after it, or a withdrawal that was given
up is executed late, behind the announcement that followed it. So each node audits its own rows all the time, a slice after the other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace

from kvstore.errors import ConcertinaError
from kvstore.metadata import IndexEntry, Metadata, NodeRecord
from kvstore.metadata.base import MAX_HOLDERS

log = logging.getLogger(__name__)

#: Keys in one call to the metadata.
SLICE_KEYS = 1000
#: Changes that wait while the metadata is away; above it they are forgotten and all blocks announced again later.
MAX_PENDING = 200_000
#: Changes are collected for so long before they are sent.
GATHER_S = 0.005
#: Pause between two slices of a full announcement: at most 50,000 blocks a second and node.
SLICE_PAUSE_S = 0.02
#: Pause between the audits of two slices: 1,000 reads a second, a million blocks in 17 minutes.
AUDIT_S = 1.0


class Announcer:
    """Heartbeats and index changes of one incarnation.

    Parameters
    ----------
    metadata : Metadata
    record : callable
        The node's record as it is now.
    describe : callable
        The index entry of a key, or None if it is not resident.
    keys : callable
        All resident keys.
    heartbeat_s : float
    """

    def __init__(
        self,
        metadata: Metadata,
        record: Callable[[], NodeRecord],
        describe: Callable[[bytes], IndexEntry | None],
        keys: Callable[[], Iterable[bytes]],
        heartbeat_s: float,
    ) -> None:
        self._metadata = metadata
        self._record = record
        self._beats = 0
        self._describe = describe
        self._keys = keys
        self._heartbeat_s = heartbeat_s
        self._pending: dict[bytes, None] = {}
        self._again: list[bytes] = []
        self._unaudited: list[bytes] = []
        self._wake = asyncio.Event()
        self._reachable = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def touch(self, key: bytes) -> None:
        """Note that the presence or fidelity of `key` changed."""
        self._pending[key] = None
        if len(self._pending) > MAX_PENDING:
            self._announce_all()
        self._wake.set()

    async def start(self) -> None:
        """Send the first heartbeat and begin. A metadata store that is away does not stop a node from starting."""
        await self._beat()
        self._tasks = [asyncio.create_task(step()) for step in (self._beat_on, self._flush_on, self._audit_on)]

    async def stop(self, timeout_s: float) -> None:
        """End the membership and withdraw all blocks, as far as that goes in `timeout_s`."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with suppress(ConcertinaError, TimeoutError):
            async with asyncio.timeout(timeout_s):
                record, keys = self._record(), list(self._keys())
                await self._metadata.leave(record)
                for at in range(0, len(keys), SLICE_KEYS):
                    await self._metadata.withdraw(record.incarnation, keys[at : at + SLICE_KEYS])

    def _announce_all(self) -> None:
        self._pending.clear()
        self._again = list(self._keys())
        self._wake.set()

    async def _beat(self) -> None:
        self._beats += 1
        try:
            known = await self._metadata.heartbeat(replace(self._record(), beat=self._beats))
        except ConcertinaError as error:
            if self._reachable.is_set() or not self._tasks:
                log.warning("the metadata is away, serving on without it: %s", error)
            self._reachable.clear()
            return
        except Exception:  # whatever is wrong with the metadata, the beats go on
            log.exception("a heartbeat failed")
            self._reachable.clear()
            return
        if not known:
            self._announce_all()
        self._reachable.set()

    async def _beat_on(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s)
            await self._beat()

    async def _audit_on(self) -> None:
        while True:
            await asyncio.sleep(AUDIT_S)
            if self._reachable.is_set() and not self._again:
                with suppress(ConcertinaError):
                    await self._audit()

    async def _audit(self) -> None:
        """Look up one slice of our own rows; what is missing or wrong is announced again. A row that four others fill stays theirs."""
        self._unaudited = self._unaudited or list(self._keys())
        keys = self._unaudited[-SLICE_KEYS:]
        del self._unaudited[-SLICE_KEYS:]
        own = self._record().incarnation
        for key, places in zip(keys, await self._metadata.locate(keys) if keys else (), strict=True):
            row = next((place for place in places if place.incarnation == own), None)
            entry = self._describe(key)
            if entry is not None and (len(places) < MAX_HOLDERS if row is None else row.fidelity != entry.fidelity):
                self.touch(key)

    async def _flush_on(self) -> None:
        while True:
            await self._wake.wait()
            await self._reachable.wait()
            await asyncio.sleep(GATHER_S)
            await self._flush()

    async def _flush(self) -> None:
        """Send one slice: changes first, then what must be announced again."""
        keys = [key for key, _ in zip(self._pending, range(SLICE_KEYS), strict=False)]
        for key in keys:
            del self._pending[key]
        again, self._again = self._again[-SLICE_KEYS:], self._again[:-SLICE_KEYS]
        try:
            await self._send(dict.fromkeys(keys + again))
        except ConcertinaError as error:
            log.warning("%d index changes wait for the metadata: %s", len(keys) + len(again), error)
            self._reachable.clear()
            for key in keys:
                self._pending.setdefault(key)
            self._again += again
            return
        if self._again:
            await asyncio.sleep(SLICE_PAUSE_S)
        elif not self._pending:
            self._wake.clear()

    async def _send(self, keys: Iterable[bytes]) -> None:
        entries, gone = [], []
        for key in keys:
            entry = self._describe(key)
            if entry is None:
                gone.append(key)
            else:
                entries.append(entry)
        incarnation = self._record().incarnation
        if entries:
            await self._metadata.announce(incarnation, entries)
        if gone:
            await self._metadata.withdraw(incarnation, gone)
