"""One tier with its index, its bound and its queue. Lives on the event loop; what blocks runs in threads, writes in one, in order.

The law: what the entries cost adds up to `used_bytes`, which never passes `capacity_bytes`; as a victim's removal is queued before
the write that it makes room for, neither does what is on the disk. A block whose write has not ended is read from memory.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from kvstore.arena import AccountingError
from kvstore.block import BlockHeader, EncodedBlock
from kvstore.clock import Clock
from kvstore.errors import CapacityError, ConcertinaError, CorruptBlockError
from kvstore.eviction import create
from kvstore.eviction.base import BlockInfo, Request
from kvstore.identity import NO_PARENT

from ..quality import is_better
from ..table import Aliases, block_id
from . import record
from .base import Buffer, SpillTier, Survivor

log = logging.getLogger(__name__)

#: After a failed write nothing is written for so long: a full disk costs a try now and then, not one a block.
PAUSE_S = 5.0
#: Files of an earlier process that are looked at before the event loop gets its turn.
SLICE_FILES = 256
READ_THREADS = 2


@dataclass(frozen=True, slots=True, eq=False)
class Spilled:
    """A block in a tier. Its header is kept as bytes, a third of the memory of the object."""

    owner: str
    key: bytes
    namespace: bytes
    header_bytes: bytes
    fidelity: int
    block_bytes: int
    size_bytes: int

    @property
    def header(self) -> BlockHeader:
        return BlockHeader.from_bytes(self.header_bytes)

    @classmethod
    def of(cls, owner: str, header: BlockHeader) -> Spilled:
        total = header.total_bytes
        return cls(owner, header.key, header.namespace, header.to_bytes(), header.present, total, total + len(record.prefix(owner)))


@dataclass(slots=True)
class LevelTally:
    """Events since the start: blocks written, read, found damaged, and blocks lost by reason."""

    stored: int = 0
    read: int = 0
    corrupt: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


class Level:
    """See the module.

    Parameters
    ----------
    tier : SpillTier
    capacity_bytes : int
        Records that may be held, by what they cost.
    queue_bytes : int
        Records that may wait to be written; a block that comes on top is not spilled.
    clock : Clock
    changed : callable
        Told the key of each block whose presence changed, but for those that are offered.
    """

    def __init__(
        self, tier: SpillTier, capacity_bytes: int, queue_bytes: int, clock: Clock, changed: Callable[[bytes], None] = lambda key: None
    ) -> None:
        self.tier = tier
        self.capacity_bytes = capacity_bytes
        self.queue_bytes = queue_bytes
        self.used_bytes = self.queued_bytes = 0
        self.entries: dict[bytes, Spilled] = {}
        self.aliases = Aliases()
        self.tally = LevelTally()
        self._clock = clock
        self._changed = changed
        self._policy = create("lru")
        self._uses = itertools.count(1)
        self._writing: dict[bytes, Sequence[Buffer]] = {}
        self._jobs: set[asyncio.Future[None]] = set()
        self._paused_until = float("-inf")
        self._recovering = False
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="spill-write")
        self._readers = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="spill-read")

    def wants(self, id: bytes, owner: str, header: BlockHeader) -> bool:
        """Whether `offer` would take this block now; a block that is no better than the copy here is not wanted."""
        size = self.tier.cost(len(record.prefix(owner)) + header.total_bytes)
        if id in self.entries and not is_better(header, self.entries[id].header):
            return False
        for reason, refused in (
            ("recovering", self._recovering),
            ("too_large", size > self.capacity_bytes),
            ("paused", self._clock.now() < self._paused_until),
            ("queue", self.queued_bytes + size > self.queue_bytes),
        ):
            if refused:
                self.tally.dropped[reason] += 1
                return False
        return True

    def offer(self, id: bytes, block: Spilled, payload: Sequence[Buffer]) -> None:
        """Take a block that is wanted; `payload` must not change any more."""
        pieces = (record.prefix(block.owner), block.header_bytes, *payload)
        self._add(id, block)
        self._writing[id] = pieces
        self.queued_bytes += block.size_bytes
        self._queue(self._write, id, pieces, done=lambda error: self._written(id, block, error))

    def remove(self, id: bytes) -> bool:
        """Forget a block. Returns whether it was here."""
        entry = self.entries.pop(id, None)
        if entry is None:
            return False
        self.used_bytes -= self.tier.cost(entry.size_bytes)
        self.aliases.discard(entry.key, id)
        self._policy.removed(id)
        self._writing.pop(id, None)
        self._queue(self.tier.drop, id, done=self._removed)
        return True

    def forget(self, id: bytes) -> bool:
        """The same on its owner's word; the index is told."""
        entry = self.entries.get(id)
        if entry is None:
            return False
        self.remove(id)
        self._changed(entry.key)
        return True

    async def read(self, id: bytes) -> EncodedBlock | None:
        """The verified block; None where it is not here, or is not what it should be: then it is removed, and counted."""
        entry = self.entries.get(id)
        if entry is None:
            return None
        try:
            block = await asyncio.get_running_loop().run_in_executor(self._readers, self._read, id, entry, self._writing.get(id))
        except ConcertinaError as error:
            if self.entries.get(id) is entry:  # else it was dropped or replaced under the reader's hands
                log.warning("a block that was spilled to %s is a miss: %s", self.tier.name, error)
                corrupt = isinstance(error, CorruptBlockError)
                self.tally.corrupt += corrupt
                self.tally.dropped["corrupt" if corrupt else "unreadable"] += 1
                self.remove(id)
                self._changed(entry.key)
            return None
        self.tally.read += 1
        if id in self.entries:
            self._touch(id, block.header)
        return block

    async def recover(self) -> None:
        """Find again what an earlier process left, a slice at a time; what does not fit the capacity any more is removed."""
        survivors, loop = self.tier.survivors(), asyncio.get_running_loop()
        self._recovering = True  # what is not found yet takes its place all the same
        try:
            while found := await loop.run_in_executor(self._readers, lambda: list(islice(survivors, SLICE_FILES))):
                for survivor in found:
                    self._recover(survivor)
        except ConcertinaError as error:
            log.warning("what an earlier process spilled to %s is left where it is: %s", self.tier.name, error)
        finally:
            self._recovering = False

    async def flush(self) -> None:
        """Wait until everything that was queued has been written or has failed."""
        while self._jobs:
            await asyncio.wait(set(self._jobs))

    def close(self) -> None:
        """End the threads after the calls that run, and give the tier back. What still waits is not written."""
        self._writer.shutdown(wait=True, cancel_futures=True)
        self._readers.shutdown(wait=True, cancel_futures=True)
        self.tier.close()

    def check(self) -> None:
        """Verify the law. Raises AccountingError."""
        held = sum(self.tier.cost(entry.size_bytes) for entry in self.entries.values())
        if held != self.used_bytes or held > self.capacity_bytes:
            raise AccountingError(f"spilled blocks have {held} bytes, the sum says {self.used_bytes} of {self.capacity_bytes}")

    # ---- steps on the event loop

    def _add(self, id: bytes, block: Spilled) -> None:
        """Enter a block, in place of another under its id; the least valuable make room."""
        self.remove(id)
        cost = self.tier.cost(block.size_bytes)
        while self.used_bytes + cost > self.capacity_bytes:
            victim = self._policy.victim(self._clock.now())
            if victim is None:
                raise AccountingError("a tier is full and has nothing to give up")
            key = self.entries[victim.id].key
            self.tally.dropped["pressure"] += 1
            self.remove(victim.id)
            self._changed(key)
        self.entries[id] = block
        self.used_bytes += cost
        self.aliases.add(block.key, id)
        self._touch(id, block.header)

    def _touch(self, id: bytes, header: BlockHeader) -> None:
        entry = self.entries[id]
        parent = None if header.parent == NO_PARENT else block_id(entry.owner, header.parent)
        info = BlockInfo(id, parent, header.start // header.tokens, (entry.size_bytes,))
        self._policy.access(Request(next(self._uses), self._clock.now()), [info])

    def _recover(self, survivor: Survivor) -> None:
        id = survivor.id
        if id in self.entries:
            return  # written anew by this process
        try:
            head = record.read_head(survivor.head)
            if head.size_bytes != survivor.size_bytes or block_id(head.owner, head.header.key) != id:
                raise CorruptBlockError("its size or its name is not that of its block")
        except CorruptBlockError as error:
            log.warning("a spilled block of an earlier process is removed: %s", error)
            self.tally.corrupt += 1
            self._queue(self.tier.drop, id, done=self._removed)
            return
        if self.tier.cost(head.size_bytes) > self.capacity_bytes:
            self._queue(self.tier.drop, id, done=self._removed)
            return
        self._add(id, Spilled.of(head.owner, head.header))
        self._changed(head.header.key)

    def _queue(self, call: Callable[..., None], *args: object, done: Callable[[BaseException | None], None]) -> None:
        """Run `call` after everything queued before, then `done` on the event loop with what it raised."""
        job = asyncio.get_running_loop().run_in_executor(self._writer, call, *args)
        self._jobs.add(job)

        def ended(job: asyncio.Future[None]) -> None:
            self._jobs.discard(job)
            if not job.cancelled():
                done(job.exception())

        job.add_done_callback(ended)

    def _written(self, id: bytes, block: Spilled, error: BaseException | None) -> None:
        self.queued_bytes -= block.size_bytes
        if self.entries.get(id) is not block:
            return  # replaced or removed meanwhile
        self._writing.pop(id, None)
        if error is None:
            self.tally.stored += 1
            return
        log.warning("nothing is spilled to %s for %g s: %s", self.tier.name, PAUSE_S, error)
        self.tally.dropped["full" if isinstance(error, CapacityError) else "unwritable"] += 1
        self._paused_until = self._clock.now() + PAUSE_S
        self.remove(id)
        self._changed(block.key)

    def _removed(self, error: BaseException | None) -> None:
        if error is not None:
            log.warning("%s", error)

    # ---- steps in a thread

    def _write(self, id: bytes, pieces: Sequence[Buffer]) -> None:
        if self._writing.get(id) is pieces:  # else it was removed or replaced while it waited
            self.tier.store(id, pieces)

    def _read(self, id: bytes, entry: Spilled, waiting: Iterable[Buffer] | None) -> EncodedBlock:
        data = self.tier.load(id, entry.size_bytes) if waiting is None else b"".join(waiting)
        owner, block = record.read(data)
        if owner != entry.owner or block.header.key != entry.key:
            raise CorruptBlockError("the bytes under a spilled block's name are another block")
        return block
