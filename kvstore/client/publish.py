"""Write-behind publishing: a bounded queue that sheds what does not fit, and one task that empties it.

The caller never waits. Each round takes a batch, asks the index once which of its blocks are already held as good and where their
parents are, chooses a node for the rest of each request, in however many batches it comes, and sends one Put stream to each. What is
little, and can go to one node of this host only, is sent to it unasked. Of what follows a refused block the headers alone are sent: its
policy goes by all that is asked for.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

from kvstore.arena.host import host_identity
from kvstore.block import EncodedBlock
from kvstore.errors import ConcertinaError, InvalidInputError
from kvstore.identity import NO_PARENT
from kvstore.metadata import Location, NodeRecord
from kvstore.metrics import Metrics
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from .claims import Claims
from .config import ClientConfig
from .doors import Doors
from .frames import put_messages
from .lookup import Lookup
from .membership import Membership
from .placement import Placement
from .transport import Transport

log = logging.getLogger(__name__)

#: A batch is tried so often on living nodes before it is given up.
ATTEMPTS = 3
#: No more than this is sent to a node of this host without asking the index what it has already.
UNASKED_BYTES = 8 << 20
#: Refused blocks that are remembered, so that of what follows them no payload is sent.
MAX_REFUSED = 16_384
#: Runs of which more may come.
MAX_BEGUN = 1024
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0

#: Outcome of a block -> reason under which it counts as dropped. The other outcomes mean that the store has it.
_DROPPED = {
    pb.BLOCK_STATUS_RESOURCE_EXHAUSTED: "no_room",
    pb.BLOCK_STATUS_DATA_LOSS: "corrupt",
    pb.BLOCK_STATUS_BUSY: "busy",
}


class _Item(NamedTuple):
    block: EncodedBlock
    size_bytes: int
    input_tokens: int
    copy_to: str = ""
    told: bool = False  # its header alone


class Publisher:
    """The queue and its task. `offer` may be called from the event loop's thread only."""

    def __init__(
        self,
        transport: Transport,
        membership: Membership,
        lookup: Lookup,
        claims: Claims,
        config: ClientConfig,
        metrics: Metrics,
        doors: Doors | None = None,
    ) -> None:
        self._transport = transport
        self._membership = membership
        self._lookup = lookup
        self._claims = claims
        self._config = config
        self._doors = doors
        self._dropped = metrics.publish_dropped
        self._corrupt = metrics.corrupt_blocks
        self._gauge = metrics.publish_queue_blocks
        self._placement = Placement(host_identity())
        self._refused: OrderedDict[bytes, str] = OrderedDict()  # by whom
        self._begun: OrderedDict[tuple[bytes, int], str] = OrderedDict()  # node of a run, by the last key so far and its prompt's length
        self._queue: deque[_Item] = deque()
        self._queued_bytes = 0
        self._in_flight = 0
        self._more = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self, flush_s: float) -> None:
        """Publish for at most `flush_s` more seconds; what is left is dropped and counted."""
        if self._task is None:
            return
        await self.flush(flush_s)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None
        self._drop(len(self._queue) + self._in_flight, "closed")
        self._queue.clear()
        self._queued_bytes = self._in_flight = 0
        self._note()

    def offer(self, blocks: Sequence[EncodedBlock], input_tokens: int, copy_to: str = "") -> int:
        """Take the leading blocks that fit; the rest is dropped and counted. Returns how many were taken.

        Blocks for the node `copy_to` (an incarnation) are second copies of what another node holds.

        Raises
        ------
        InvalidInputError
            For a block that has not been given its key and namespace.
        """
        if any(block.header.key == NO_PARENT or block.header.namespace == NO_PARENT for block in blocks):
            raise InvalidInputError("a block must be named before it is published; call EncodedBlock.with_identity")
        if self._task is None:
            self._drop(len(blocks), "closed")
            return 0
        taken = 0
        for block in blocks:
            size = block.header.total_bytes
            if self._waiting >= self._config.queue_blocks or self._queued_bytes + size > self._config.queue_bytes:
                break
            self._queue.append(_Item(block, size, input_tokens, copy_to))
            self._queued_bytes += size
            taken += 1
        self._drop(len(blocks) - taken, "full")
        self._note()
        return taken

    async def flush(self, timeout_s: float) -> bool:
        """Wait until nothing waits or is under way. Returns False when `timeout_s` passed first."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    @property
    def _waiting(self) -> int:
        return len(self._queue) + self._in_flight

    def _note(self) -> None:
        """Bring gauge and events in step with the queue."""
        self._gauge.set(self._waiting)
        (self._more.set if self._queue else self._more.clear)()
        (self._empty.clear if self._waiting else self._empty.set)()

    def _drop(self, count: int, reason: str) -> None:
        if count:
            self._dropped.labels(reason).inc(count)

    async def _run(self) -> None:
        while True:
            await self._more.wait()
            batch = self._take()
            self._note()
            try:
                await self._publish(batch)
            except Exception:  # a fault of ours in one batch must not end publishing for good
                log.exception("%d blocks are not published", len(batch))
                self._drop(len(batch), "error")
            await self._claims.release([item.block.header.key for item in batch])
            self._in_flight = 0
            self._queued_bytes -= sum(item.size_bytes for item in batch)
            self._note()

    def _take(self) -> list[_Item]:
        """The next batch, off the queue; its bytes stay counted until it has been dealt with."""
        batch: list[_Item] = []
        size = 0
        while self._queue and len(batch) < self._config.batch_blocks:
            size += self._queue[0].size_bytes
            if batch and size > self._config.batch_bytes:
                break
            batch.append(self._queue.popleft())
        self._in_flight = len(batch)
        return batch

    async def _publish(self, batch: list[_Item]) -> None:
        """Until every block of `batch` is stored, refused, or given up."""
        pause_s, failures = FIRST_PAUSE_S, 0
        while batch and failures < ATTEMPTS:
            nodes = self._membership.living()
            try:
                shares = await self._share(batch, nodes) if nodes else None
            except ConcertinaError:
                shares = None
            if shares is None:  # nobody there: wait, while the bounded queue sheds what is new
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                continue
            left = await asyncio.gather(*(self._put(node, items) for node, items in shares))
            batch = [item for items in left for item in items]
            failures += 1
        self._drop(len(batch), "unavailable")

    async def _share(self, batch: list[_Item], nodes: dict[str, NodeRecord]) -> Iterable[tuple[NodeRecord, list[_Item]]]:
        """Which node gets what: the only one all of it if it is to be asked itself, else by the index, in one round trip."""
        if (node := self._to_ask(batch, nodes)) is not None:
            return [(node, batch)]
        keys = dict.fromkeys(key for item in batch for key in (item.block.header.parent, item.block.header.key))
        keys.pop(NO_PARENT, None)
        found = dict(zip(keys, await self._lookup.locate(list(keys)), strict=True))
        shares: dict[str, tuple[NodeRecord, list[_Item]]] = {}
        for node, item in self._place(batch, found, nodes):
            shares.setdefault(node.incarnation, (node, []))[1].append(item)
        return shares.values()

    def _to_ask(self, batch: Sequence[_Item], nodes: dict[str, NodeRecord]) -> NodeRecord | None:
        """The node that says sooner than the index what of the batch it has: alone, on this host, and there is little to write."""
        if len(nodes) != 1 or self._doors is None or self._refused or not self._membership.available:
            return None
        (node,) = nodes.values()
        if self._doors.to(node) != "local" or any(item.copy_to for item in batch):
            return None
        return node if sum(item.size_bytes for item in batch) <= UNASKED_BYTES else None

    def _place(
        self, batch: Iterable[_Item], found: dict[bytes, tuple[Location, ...]], nodes: dict[str, NodeRecord]
    ) -> Iterator[tuple[NodeRecord, _Item]]:
        """A node for each block that no living node holds as good; a worse copy is replaced where it is."""
        self._placement.update(nodes.values())
        homes = {key: place.incarnation for key, places in found.items() for place in places if place.incarnation in nodes}
        for run in _runs(batch):
            placed: list[tuple[str, _Item]] = []
            new: list[_Item] = []
            for item in run:
                header = item.block.header
                held = [place for place in found[header.key] if place.incarnation in nodes]
                if item.copy_to:
                    if item.copy_to in nodes and len(held) == 1 and held[0].incarnation != item.copy_to:
                        placed.append((item.copy_to, item))
                elif not held and header.parent in self._refused and not found.get(header.parent):
                    placed.append(self._without_payload(item))
                elif not held:
                    self._refused.pop(header.key, None)  # asked again, and perhaps wanted now
                    new.append(item)
                    placed.append(("", item))
                elif all(place.fidelity < header.present for place in held):
                    placed.append((held[0].incarnation, item))
            home = self._home(run, new, homes, nodes)
            yield from ((nodes[node or home], item) for node, item in placed if not item.told or node in nodes)

    def _without_payload(self, item: _Item) -> tuple[str, _Item]:
        """A block that would only take room without its parent: its header, for the node that refused the parent."""
        header = item.block.header
        node = self._refused[header.parent]
        self._refuse(header.key, node)
        self._drop(1, "no_room")
        return node, item._replace(block=EncodedBlock.build(replace(header, rows=header.rows[:1]), (b"",)), told=True)

    def _home(self, run: list[_Item], new: list[_Item], homes: dict[bytes, str], nodes: dict[str, NodeRecord]) -> str:
        """The node for what is `new` of a run: the one that has its beginning, else the one where least has to leave for all of it."""
        first, last = run[0], run[-1]
        home = self._begun.pop((first.block.header.parent, first.input_tokens), "")
        if home not in nodes:
            home = ""
        if new:
            keys, size = [item.block.header.key for item in new], sum(item.size_bytes for item in new)
            if home:
                self._placement.follow(keys, size, home)
            else:
                parent = new[0].block.header.parent
                coming_bytes = sum(item.size_bytes for item in self._coming(last))
                home = self._placement.choose(keys, size, homes.get(parent), parent, coming_bytes)
        if home and (last.input_tokens or self._coming(last)):
            self._begun[last.block.header.key, last.input_tokens] = home
            if len(self._begun) > MAX_BEGUN:
                self._begun.popitem(last=False)
        return home

    def _coming(self, last: _Item) -> list[_Item]:
        """What goes on from here in the queue."""
        return next(_runs(chain((last,), self._queue)))[1:]

    async def _put(self, node: NodeRecord, items: list[_Item]) -> list[_Item]:
        """One Put stream. Returns what a failing node did not take."""
        try:
            statuses = await self._put_through_door(node, items)
            if statuses is None:
                messages = put_messages((item.block, item.input_tokens) for item in items)
                statuses = (await self._transport.put(node.address, messages, self._config.put_timeout_s)).statuses
        except ConcertinaError as error:
            log.info("node %s did not take %d blocks: %s", node.address, len(items), error)
            self._membership.suspect(node, "node")
            return [item for item in items if not item.told]
        for item, status in zip(items, statuses, strict=False):
            if item.told:
                continue  # it is not stored, as was said before
            if status in _DROPPED:
                self._drop(1, _DROPPED[status])
            if status == pb.BLOCK_STATUS_RESOURCE_EXHAUSTED:
                self._refuse(item.block.header.key, node.incarnation)
            if status == pb.BLOCK_STATUS_DATA_LOSS:
                self._corrupt.labels("publish").inc()
        return []

    def _refuse(self, key: bytes, incarnation: str) -> None:
        """This node does not want the block, so the store wants none that follows it either."""
        self._refused[key] = incarnation
        self._refused.move_to_end(key)
        while len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)

    async def _put_through_door(self, node: NodeRecord, items: list[_Item]) -> Sequence[int] | None:
        """A status for each block; None where there is no door, or it failed: gRPC may find some of the blocks there already."""
        if self._doors is None:
            return None
        blocks, timeout_s = [(item.block, item.input_tokens) for item in items], self._config.put_timeout_s
        return await self._doors.through(node, lambda door: door.write(blocks, timeout_s), lambda door: door.begin(blocks, timeout_s))


def _runs(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    """Consecutive blocks of one request and chain."""
    run: list[_Item] = []
    for item in items:
        if run and (item.block.header.parent != run[-1].block.header.key or item.input_tokens != run[-1].input_tokens):
            yield run
            run = []
        run.append(item)
    if run:
        yield run
