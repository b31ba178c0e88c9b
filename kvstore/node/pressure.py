"""This node's part in the cluster's one order of value: it publishes its pressure, and derives the waterline from everyone's.

The report travels in the node's own record, with every heartbeat, and so does what it holds of tenants that have a quota. All of it
is soft: without news of others a node goes by its own bytes alone, as a single store would.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from kvstore.errors import ConcertinaError, InvalidInputError
from kvstore.eviction.cluster import Pressure, waterline
from kvstore.metadata import Metadata, NodeRecord
from kvstore.metadata.subjects import FLOORS, MAX_SUBJECTS, QUOTAS

from .engine import NodeEngine

log = logging.getLogger(__name__)

#: A report is made afresh after so many seconds or requests, whichever comes first.
REPORT_S = 0.25
REPORT_REQUESTS = 20
#: Weight of the newest sample in the mean number of readers.
_READERS_WEIGHT = 0.25
#: Seconds between two exchanges of lessons, about 41 KB a node; they are cumulative, so an old one is a little short, never wrong.
LESSONS_S = 10.0
LESSONS_TTL_S = 6 * LESSONS_S


class ClusterOrder:
    """Reports of one node, and what it derives from those of all.

    Parameters
    ----------
    engine : NodeEngine
        Its `admission` is told the waterline and the quotas.
    metadata : Metadata
    incarnation : str
        The node's own.
    interval_s : float
        Seconds between two reads of the others' reports.
    """

    def __init__(self, engine: NodeEngine, metadata: Metadata, incarnation: str, interval_s: float) -> None:
        self._engine = engine
        self._metadata = metadata
        self._incarnation = incarnation
        self._interval_s = interval_s
        self._report: Pressure | None = None
        self._reported = (0.0, 0)
        self._readers = 0.0
        self._others: list[str] = []
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        clock, shortest_s = self._engine.clock, self._interval_s
        born = clock.now()
        steps = (lambda: shortest_s, self.listen), (lambda: lessons_pause_s(clock.now() - born, shortest_s), self.learn)
        self._tasks = [asyncio.create_task(_every(pause_s, step)) for pause_s, step in steps]

    async def stop(self) -> None:
        """Hear no more. Safe to call twice."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def report(self) -> Pressure:
        """This node's pressure, at most `REPORT_S` seconds and `REPORT_REQUESTS` requests old."""
        now, requests = self._engine.clock.now(), self._engine.requests.count
        since, until = self._reported
        if self._report is None or now - since >= REPORT_S or requests - until >= REPORT_REQUESTS:
            self._reported = now, requests
            engine = self._engine
            self._readers += _READERS_WEIGHT * (len(engine.holds.leases) - self._readers)  # what it serves is under a lease
            self._report = Pressure.of(engine.free_bytes, engine.arena_bytes, *engine.policy.census(now))
        return self._report

    def sign(self, record: NodeRecord) -> NodeRecord:
        """The node's record with its report, how many read at a time, and what it holds of tenants with a quota."""
        usage = json.dumps(self._engine.admission.quotas.usage())
        return replace(record, pressure=self.report().to_text(), readers=round(self._readers, 2), usage=usage)

    def hear(self, records: Iterable[NodeRecord], quotas: bytes | None, floors: bytes | None = None) -> None:
        """Take the newest records of all living nodes, this one's included, and the metadata's values of `QUOTAS` and `FLOORS`.

        Raises
        ------
        InvalidInputError
            For quotas or floors that cannot be read; those before stay.
        """
        others = [record for record in records if record.incarnation != self._incarnation]
        self._others = [record.incarnation for record in others]
        reports = [Pressure.from_text(r.pressure, max(r.arena_bytes - r.used_bytes, 0), r.arena_bytes) for r in others]
        admission = self._engine.admission
        admission.waterline = waterline([self.report(), *reports])
        admission.quotas.hear(QUOTAS.parse(quotas), [_usage(record) for record in others])
        admission.floors.hear(FLOORS.parse(floors))

    async def listen(self) -> None:
        """Read what `hear` takes. Raises what the metadata raises."""
        settings = [await self._metadata.get_value(setting.name) for setting in (QUOTAS, FLOORS)]
        self.hear(await self._metadata.nodes(), *settings)

    async def learn(self) -> None:
        """Tell the others what this node's policy learnt, and heed what theirs did. Raises what the metadata raises."""
        policy = self._engine.policy
        if mine := policy.lessons():
            await self._metadata.set_value(self._lessons_of(self._incarnation), mine, ttl_s=LESSONS_TTL_S)
            found = [await self._metadata.get_value(self._lessons_of(incarnation)) for incarnation in self._others]
            policy.heed([lessons for lessons in found if lessons is not None])

    def _lessons_of(self, incarnation: str) -> str:
        return f"lessons:{self._engine.policy.name}:{incarnation}"


def lessons_pause_s(age_s: float, shortest_s: float) -> float:
    """Seconds until a node of this age exchanges lessons again: a young one, to whom each is news, whenever it is a tenth older."""
    return min(LESSONS_S, max(shortest_s, 0.1 * age_s))


async def _every(pause_s: Callable[[], float], step: Callable[[], Awaitable[None]]) -> None:
    while True:
        await asyncio.sleep(pause_s())
        try:
            await step()
        except InvalidInputError as error:
            log.warning("another node's news cannot be read and is left out: %s", error)
        except ConcertinaError as error:
            log.debug("no news of other nodes: %s", error)


def _usage(record: NodeRecord) -> dict[str, int]:
    """What the record says of tenants; nothing where that cannot be read."""
    try:
        found = json.loads(record.usage or "{}")
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict) or len(found) > MAX_SUBJECTS:
        return {}
    return {subject: size for subject, size in found.items() if type(size) is int and size >= 0}
