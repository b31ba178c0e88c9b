"""Who is alive, as this client last heard, and whether the metadata answers at all.

One loop reads the membership all the time. It is also the probe of the circuit breaker: a call that found Redis away opens it, the
next read that succeeds closes it, and in between nobody waits for Redis.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from kvstore.clock import Clock
from kvstore.errors import ConcertinaError, TransportError
from kvstore.metadata import Metadata, NodeRecord
from kvstore.metrics import Metrics

log = logging.getLogger(__name__)

#: Channels stay open for so long after their node was last heard of: Redis losing its state must not cut what is being read.
KEEP_CHANNELS_S = 30.0
#: Unknown incarnations remembered, with the time and the read at which each was first met.
MAX_STRANGERS = 4096


class Membership:
    """The living nodes by incarnation, less those that have just failed a call.

    Parameters
    ----------
    changed : callable
        Awaited after each read with the addresses of all nodes that lived in the last KEEP_CHANNELS_S seconds.
    """

    def __init__(
        self,
        metadata: Metadata,
        clock: Clock,
        metrics: Metrics,
        refresh_s: float,
        suspect_s: float,
        changed: Callable[[set[str]], Awaitable[None]],
    ) -> None:
        self.metadata = metadata
        self.available = False
        self._begun = self._ended = 0  # reads of the membership
        self._clock = clock
        self._unavailable = metrics.store_unavailable
        self._refresh_s = refresh_s
        self._suspect_s = suspect_s
        self._changed = changed
        self._nodes: dict[str, NodeRecord] = {}
        self._heard: dict[str, float] = {}
        self._suspects: dict[str, float] = {}
        self._strangers: dict[str, tuple[float, int]] = {}
        self._soon = asyncio.Event()
        self._fresh = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read once, then keep reading."""
        await self._refresh()
        self._task = asyncio.create_task(self._refresh_on())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def living(self) -> dict[str, NodeRecord]:
        """Nodes that may be called now."""
        now = self._clock.now()
        self._suspects = {i: until for i, until in self._suspects.items() if until > now}
        if not self._suspects:
            return self._nodes
        return {i: record for i, record in self._nodes.items() if i not in self._suspects}

    def everyone(self) -> dict[str, NodeRecord]:
        """The living nodes, those that just failed a call included."""
        return self._nodes

    def suspect(self, node: NodeRecord, part: str) -> None:
        """Leave a node alone for a moment: it failed a call. Counted as ``store_unavailable_total{part}``."""
        self.count(part)
        self._suspects[node.incarnation] = self._clock.now() + self._suspect_s

    def count(self, part: str) -> None:
        """Count a call that went on without `part` of the store."""
        self._unavailable.labels(part).inc()

    def lost(self, error: ConcertinaError) -> None:
        """Note that a call of the metadata failed: nobody waits for it again until a read has succeeded."""
        self.count("redis")
        if self.available:
            log.warning("going on without the store's metadata: %s", error)
        self.available = False
        self._soon.set()

    def require(self) -> Metadata:
        """The metadata, unless it is away. Raises TransportError (counted) when it is."""
        if not self.available:
            self.count("redis")
            raise TransportError("the store's metadata is away")
        return self.metadata

    def stranger_for_s(self, incarnation: str) -> float | None:
        """Seconds since `incarnation`, which is not alive, was first asked about; None until a read of the membership has begun since."""
        if len(self._strangers) >= MAX_STRANGERS:
            self._strangers.clear()
        now = self._clock.now()
        since = self._strangers.setdefault(incarnation, (now, self._begun))
        return None if since[1] == self._begun else now - since[0]

    async def next_read(self) -> None:
        """Have the membership read at once; returns when a read that began after this call has ended, or failed."""
        wanted = self._begun + 1
        self._soon.set()
        async with self._fresh:
            await self._fresh.wait_for(lambda: self._ended >= wanted)

    async def _refresh_on(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._refresh_s):
                    await self._soon.wait()
            except TimeoutError:
                pass
            self._soon.clear()
            try:
                await self._refresh()
            except Exception:  # a fault of ours in one read must not freeze the membership for good
                log.exception("the membership was not read")
                self.available = False
            if not self.available:
                await asyncio.sleep(self._refresh_s)

    async def _refresh(self) -> None:
        self._begun += 1
        try:
            nodes = await self.metadata.nodes()
        except ConcertinaError as error:
            if self.available:
                self.lost(error)
        else:
            self._nodes = {record.incarnation: record for record in nodes}
            for incarnation in self._nodes:
                self._strangers.pop(incarnation, None)
            self.available = True
            now = self._clock.now()
            self._heard |= dict.fromkeys((record.address for record in nodes), now)
            self._heard = {address: at for address, at in self._heard.items() if now - at < KEEP_CHANNELS_S}
            await self._changed(set(self._heard))
        async with self._fresh:
            self._ended = self._begun
            self._fresh.notify_all()
