"""A worker's place in the cluster's membership, kept by a beat a second."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from kvstore.errors import ConcertinaError
from kvstore.metadata import Metadata, WorkerRecord
from kvstore.metrics import Metrics

BEAT_S = 1.0
TTL_S = 4.0
log = logging.getLogger(__name__)


class Presence:
    """Beats while it runs. Redis being away is counted and otherwise ignored: membership is for `status`, not for answering.

    Parameters
    ----------
    metadata : Metadata
        Owned from here on: `stop` closes it.
    record : callable
        Makes the record of now; its id stays the same.
    metrics : Metrics
    """

    def __init__(self, metadata: Metadata, record: Callable[[], WorkerRecord], metrics: Metrics) -> None:
        self._metadata = metadata
        self._record = record
        self._metrics = metrics
        self._task: asyncio.Task | None = None

    async def start(self) -> None:
        """Beat once, then in the background."""
        await self._beat()
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Leave at once rather than by expiry."""
        if self._task:
            self._task.cancel()
            await asyncio.wait({self._task})
        with contextlib.suppress(ConcertinaError):
            await self._metadata.leave_worker(self._record().id)
        await self._metadata.close()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            await self._beat()

    async def _beat(self) -> None:
        try:
            await self._metadata.heartbeat_worker(self._record(), ttl_s=TTL_S)
        except ConcertinaError as error:
            self._metrics.store_unavailable.labels(part="membership").inc()
            log.debug("heartbeat failed: %s", error)
