"""The tiers of one node, as the rest of it sees them.

The engine tells `keep` what the arena is about to lose, and `forget` what its owner does not want any more; a Get that misses asks
`read`. Every block goes to every tier, so the fastest that still has it answers and the largest survives a restart.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager

from kvstore.block import BlockHeader, EncodedBlock

from ..quality import is_better
from ..table import Entry
from .base import Buffer
from .level import Level, Spilled

#: Blocks that are in host memory on their way out, and how long one more waits for its turn before it is a miss.
MAX_READS = 64
READ_WAIT_S = 1.0


class Spill:
    """Levels from the fastest to the largest.

    Parameters
    ----------
    levels : sequence of Level
        Empty for a node that does not spill; every call is valid then, and does nothing.
    copy : callable
        The payload of a resident block, copied out of the arena.
    """

    def __init__(self, levels: Sequence[Level] = (), copy: Callable[[Entry], Sequence[Buffer]] = lambda entry: ()) -> None:
        self.levels = list(levels)
        self._copy = copy
        self._reads = asyncio.Semaphore(MAX_READS)
        self._recovering: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to look for what an earlier process left."""
        self._recovering = [asyncio.create_task(level.recover()) for level in self.levels]

    async def stop(self) -> None:
        """End the threads and give the places back; what still waits is not written. Safe to call twice."""
        for task in self._recovering:
            task.cancel()
        await asyncio.gather(*self._recovering, return_exceptions=True)
        self._recovering = []
        for level in self.levels:
            level.close()
        self.levels = []

    def keep(self, entry: Entry) -> None:
        """Copy a block that is about to lose bytes. Its pages must still be its own."""
        takers = [level for level in self.levels if level.wants(entry.id, entry.owner, entry.header)]
        if takers:
            payload, block = self._copy(entry), Spilled.of(entry.owner, entry.header)
            for level in takers:
                level.offer(entry.id, block, payload)

    def forget(self, id: bytes) -> bool:
        """Drop every copy of a block. Returns whether there was one."""
        return sum(level.forget(id) for level in self.levels) > 0

    def find(self, id: bytes) -> Spilled | None:
        """A block that can be read."""
        return next((level.entries[id] for level in self.levels if id in level.entries), None)

    def has_better(self, id: bytes, header: BlockHeader, max_fidelity: int = 0) -> bool:
        """Whether a reader who wants at most `max_fidelity` (0: all) gets more from here than from a resident block of this header."""
        spilled = self.find(id)
        if spilled is None or spilled.fidelity <= header.present or 0 < max_fidelity <= header.present:
            return False
        return is_better(spilled.header, header)

    def named(self, key: bytes) -> list[tuple[bytes, Spilled]]:
        """Id and entry of every spilled block of this key, whoever owns it."""
        return [(id, level.entries[id]) for level in self.levels for id in (key, *level.aliases.of(key)) if id in level.entries]

    def __len__(self) -> int:
        """Entries of all tiers; a block in two tiers counts twice."""
        return sum(len(level.entries) for level in self.levels)

    def __bool__(self) -> bool:
        """Whether there is a tier at all."""
        return bool(self.levels)

    def __iter__(self) -> Iterator[tuple[bytes, Spilled]]:
        """Id and entry of each spilled block, once."""
        return iter({id: entry for level in reversed(self.levels) for id, entry in level.entries.items()}.items())

    @asynccontextmanager
    async def reading(self, id: bytes) -> AsyncIterator[EncodedBlock | None]:
        """The verified block, for the time of the context; None where there is none, or where too many are being read."""
        if self.find(id) is None:
            yield None
            return
        try:
            async with asyncio.timeout(READ_WAIT_S):
                await self._reads.acquire()
        except TimeoutError:
            yield None
            return
        try:
            yield await self._read(id)
        finally:
            self._reads.release()

    def check(self) -> None:
        """Verify the account of every level. Raises AccountingError."""
        for level in self.levels:
            level.check()

    async def drain(self, entries: Iterable[Entry]) -> None:
        """Copy all of `entries`, as fast as the tiers take them, and wait until they are written. The caller sets the deadline."""
        for entry in entries:
            size = entry.header.total_bytes
            for level in self.levels:
                if level.queued_bytes + size > level.queue_bytes:
                    await level.flush()
            self.keep(entry)
        for level in self.levels:
            await level.flush()

    async def _read(self, id: bytes) -> EncodedBlock | None:
        for level in self.levels:
            if (block := await level.read(id)) is not None:
                return block
        return None
