"""Fetching blocks: parallel Get streams, each block verified as it arrives, delivered in order, cut at the first that fails.

Each stream goes through its node's door where there is one (`doors`), and has the last word by a Get call: what the door did not give, a
block that was spilled for one, is asked for again there.

A node spreads nothing and knows nothing of prefixes; the reader decides. Block i of a fetch counts only when it is intact, is the
block that was asked for, continues block i - 1, and is as exact as asked. Everything after the first failure is worthless to a
prefix cache, so the streams stop there.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

from kvstore.block import SECTIONS, BlockHeader, EncodedBlock
from kvstore.clock import Clock
from kvstore.errors import ConcertinaError, CorruptBlockError
from kvstore.metadata import NodeRecord
from kvstore.metrics import Metrics
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from .assemble import BlockReader
from .buffers import Buffers
from .config import ClientConfig
from .door import MAX_BATCH_KEYS, Door, is_little
from .doors import Doors
from .lookup import Hit
from .membership import Membership
from .prefix import Demand, Fetch, Fetched, OnBlock
from .sections import Sections
from .transport import Transport

log = logging.getLogger(__name__)

#: A call's own deadline lies so far behind the fetch's, which decides.
GRACE_S = 0.25
#: A node is asked over several streams for at least so many bytes.
STREAMS_FROM_BYTES = 8 << 20
#: Buffers are given back to the system when nothing was fetched for so long.
BUFFERS_IDLE_S = 60.0


class Fetcher:
    """Runs fetches over a `Transport` and, where given, through `Doors`."""

    def __init__(
        self, transport: Transport, membership: Membership, config: ClientConfig, metrics: Metrics, clock: Clock, doors: Doors | None
    ) -> None:
        self._transport = transport
        self._membership = membership
        self._config = config
        self._metrics = metrics
        self._clock = clock
        self._doors = doors
        self._buffers = Buffers(config.buffer_bytes)
        self._trimming: asyncio.TimerHandle | None = None

    def stop(self) -> None:
        """Give the unused buffers back."""
        if self._trimming is not None:
            self._trimming.cancel()
        self._buffers.trim()

    async def fetch(
        self, hits: Sequence[Hit], demand: Demand, deadline_s: float, on_block: OnBlock | None = None, sections: Sections | None = None
    ) -> Fetched:
        """The longest verified prefix of `hits` that arrived within `deadline_s`. Raises only what `on_block` raises."""
        try:
            return await self._fetch(hits, demand, deadline_s, on_block, sections) if hits else Fetched([], 0)
        finally:
            if sections is not None:
                sections.end()

    async def _fetch(
        self, hits: Sequence[Hit], demand: Demand, deadline_s: float, on_block: OnBlock | None, sections: Sections | None
    ) -> Fetched:
        began = self._clock.now()
        job = Fetch(hits, demand, self._config, sections)
        plan = whole = self._plan(hits)
        if sections is not None:
            whole = [(node, positions if self._is_here(node) else job.whole_ones(positions)) for node, positions in plan]
        if is_little([hit.size_bytes for hit in hits]):
            whole = [(node, positions) for node, positions in whole if not self._find(job, node, positions)]
        streams = [asyncio.create_task(self._stream(job, node, positions, deadline_s)) for node, positions in whole if positions]
        if sections is not None:
            streams.append(asyncio.create_task(self._by_sections(job, plan, list(streams), deadline_s)))
        try:
            async with asyncio.timeout(deadline_s) as deadline:
                await job.deliver(on_block)
                await job.finish()
        except TimeoutError:
            if not deadline.expired():  # one that `on_block` raised
                raise
            job.expired = True
        finally:
            for task in streams:
                task.cancel()
            for outcome in await asyncio.gather(*streams, return_exceptions=True):
                if isinstance(outcome, Exception):
                    log.error("a stream of a fetch failed in an unforeseen way; its blocks are misses", exc_info=outcome)
        if self._trimming is not None:
            self._trimming.cancel()
        self._trimming = asyncio.get_running_loop().call_later(BUFFERS_IDLE_S, self._buffers.trim)
        self._metrics.fetch_bytes.inc(job.bytes_fetched)
        self._metrics.fetch_seconds.observe(self._clock.now() - began)
        self._metrics.corrupt_blocks.labels("fetch").inc(job.corrupt)
        return Fetched(job.whole(), job.bytes_fetched)

    def _plan(self, hits: Sequence[Hit]) -> list[tuple[NodeRecord, list[int]]]:
        """Positions by stream. The streams of one node take turns, so that the prefix grows steadily."""
        by_node: dict[str, list[int]] = {}
        for position, hit in enumerate(hits):
            by_node.setdefault(hit.node.incarnation, []).append(position)
        plan = []
        for positions in by_node.values():
            large = sum(hits[p].size_bytes for p in positions) >= STREAMS_FROM_BYTES
            streams = min(self._config.streams_per_node, len(positions)) if large else 1
            plan += [(hits[positions[0]].node, positions[start::streams]) for start in range(streams)]
        return plan

    def _is_here(self, node: NodeRecord) -> bool:
        """Whether blocks of a node are copied out of memory that it shares."""
        return self._doors is not None and self._doors.to(node) == "local"

    def _find(self, job: Fetch, node: NodeRecord, positions: Sequence[int]) -> bool:
        """Read blocks of a node on this host without asking it; False where not all are there."""
        if self._doors is None or not positions:
            return False
        blocks = self._doors.find(node, [job.hits[p].key for p in positions], job.demand.input_tokens, self._buffers)
        if not blocks:
            return False
        try:
            accepted = job.check(positions, [block.header for block in blocks])
        except CorruptBlockError:
            return False
        if accepted < len(positions):
            job.miss(positions[accepted])
        job.arrived(list(zip(positions, blocks[:accepted], strict=False)))
        job.count(sum(block.header.total_bytes for block in blocks[:accepted]))
        self._metrics.fetched_blocks.labels("local").inc(accepted)
        return True

    async def _by_sections(
        self, job: Fetch, plan: list[tuple[NodeRecord, list[int]]], whole: list[asyncio.Task[None]], deadline_s: float
    ) -> None:
        """The last blocks, after those that come whole: a section of all of them, then the next."""
        if whole:
            await asyncio.wait(whole)
        for section in range(SECTIONS):
            async with asyncio.TaskGroup() as streams:
                for node, positions in plan:
                    if lacking := job.lacking(positions, section):
                        streams.create_task(self._stream(job, node, lacking, deadline_s, section))

    async def _stream(self, job: Fetch, node: NodeRecord, positions: list[int], deadline_s: float, section: int | None = None) -> None:
        """Blocks of one node, or a section of each: through its door, and what that did not give by a Get call."""
        done = 0
        if self._doors is not None and (way := self._doors.to(node)):
            done = await self._through_door(job, node, positions, deadline_s, way, section)
        if done < len(positions) and job.wanted(positions[done]):
            await self._call(job, node, positions[done:], deadline_s, section)

    async def _through_door(
        self, job: Fetch, node: NodeRecord, positions: list[int], deadline_s: float, way: str, section: int | None
    ) -> int:
        """How many of the leading blocks came through the door."""
        loop, home, done, came = asyncio.get_running_loop(), threading.get_ident(), 0, self._metrics.fetched_blocks.labels(way)
        begun = job.begun(section)
        unfinished = [begun.get(p) for p in positions] if section else ()

        def tell(what: Callable[..., None], *of: Any) -> None:
            if threading.get_ident() == home:
                what(*of)
            else:
                loop.call_soon_threadsafe(what, *of)

        def accept(number: int, headers: Sequence[BlockHeader]) -> int:
            wanted = [p for p in positions[number : number + len(headers)] if job.wanted(p)]
            accepted = job.check(wanted, headers)
            if not accepted and wanted:
                tell(job.miss, wanted[0])
            return accepted

        def take(blocks: Sequence[tuple[int, EncodedBlock]]) -> None:
            nonlocal done
            done += len(blocks)
            if not section:
                came.inc(len(blocks))
                job.count(sum(block.header.total_bytes for _, block in blocks))
            there = [(positions[number], block) for number, block in blocks]
            tell(job.arrived, there if section is None else job.placed(there, section))

        keys, sizes = [job.hits[p].key for p in positions], [job.hits[p].size_bytes for p in positions]
        tokens, timeout_s = job.demand.input_tokens, deadline_s + GRACE_S

        def ask(door: Door) -> bool:
            if len(keys) > MAX_BATCH_KEYS:  # fewer the connection takes without waiting for the node
                return False
            door.ask(keys, sizes, tokens, timeout_s, section)
            return section is None and door.reads_at_once(sizes)

        def read(door: Door) -> int:
            return door.read(keys, sizes, tokens, accept, take, self._buffers, timeout_s, section, unfinished)

        try:
            await self._doors.through(node, read, ask)
        except CorruptBlockError as error:
            log.warning("a block of a fetch from %s was damaged, and is asked for once more: %s", node.address, error)
        except asyncio.CancelledError:
            if job.expired and not done:
                self._membership.suspect(node, "node")
            raise
        return done

    async def _call(self, job: Fetch, node: NodeRecord, positions: list[int], deadline_s: float, section: int | None = None) -> None:
        """One Get call. The first block that does not come as wanted ends it: those after it are behind the cut."""
        keys, begun = [job.hits[p].key for p in positions], job.begun(section)
        request = pb.GetRequest(keys=keys, input_tokens=job.demand.input_tokens, pack=True, section=0 if section is None else section + 1)
        reader, position, came = None, positions[0], self._metrics.fetched_blocks.labels("grpc")
        try:
            async with aclosing(self._transport.get(node.address, request, deadline_s + GRACE_S)) as messages:
                reader = BlockReader(messages, self._config.offload_bytes, self._buffers)
                for number, position in enumerate(positions):
                    if not job.wanted(position):
                        return
                    block = await reader.read(number, lambda one, at=position: job.check([at], [one]) == 1, section, begun.get(position))
                    if block is None:
                        break
                    there = [(position, block)]
                    job.arrived(there if section is None else job.placed(there, section))
                    came.inc(not section)
                else:
                    position = len(job.hits)
        except CorruptBlockError as error:
            log.warning("block %d of a fetch from %s is a miss: %s", position, node.address, error)
            job.corrupt += 1
        except ConcertinaError as error:
            log.info("node %s is left alone for a moment: %s", node.address, error)
            self._membership.suspect(node, "node")
        except asyncio.CancelledError:
            if job.expired and not (reader and reader.bytes_read):
                self._membership.suspect(node, "node")  # said nothing until the deadline
            raise
        finally:
            job.miss(position)
            job.count(reader.bytes_read if reader else 0)
