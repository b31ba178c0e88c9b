"""A request's way into the batch: a place in the line, pages, what other requests have of its prompt, and what the store has."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial

from kvstore.errors import CapacityError

from .admission import Admission, Take
from .job import Job
from .live import LiveKV, LivePool
from .naming import BlockNames
from .prefixes import LiveBlock, LivePrefixes
from .reader import StoreReader


class Seating:
    """Seats jobs, from the event loop.

    Parameters
    ----------
    pool : LivePool
    prefixes : LivePrefixes
    names : BlockNames
    reader : StoreReader or None
        None takes nothing from a store.
    requests : int
        How many may hold pages at once.
    """

    def __init__(self, pool: LivePool, prefixes: LivePrefixes, names: BlockNames, reader: StoreReader | None, requests: int) -> None:
        self._pool, self._prefixes, self._names, self._reader = pool, prefixes, names, reader
        self._requests = requests
        self.admission = Admission(requests)
        loop = asyncio.get_running_loop()

        def poke() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
                loop.call_soon_threadsafe(self.admission.poke)

        pool.pages.on_free = prefixes.on_progress = poke

    @contextlib.asynccontextmanager
    async def seat(self, job: Job) -> AsyncIterator[None]:
        """Inside, `job` has its pages, and in them what of its prompt could be had. It gives them back itself; the place ends here."""
        kv = LiveKV(self._pool)
        prefix = self._names.prefix(job.spec, kv)
        size = self._pool.block_tokens
        usable = max(0, len(job.spec.tokens) - job.compute) // size

        def take() -> Take:
            blocks = self._prefixes.begin(job.id, prefix.keys, usable, job.spec.max_distortion)
            if blocks is None:
                return Take.LATER
            kv.adopt([block.page for block in blocks])
            prefix.adopt(blocks[-1].provenance if blocks else prefix.provenance, len(blocks), size)
            said = 0 if job.press else len(job.output)  # it gave way before, and will want that much again
            if self._reserve(kv, len(job.spec.tokens) + said + 1):
                return Take.TAKEN
            self._prefixes.withdraw(job.id)
            kv.release()
            return Take.NO_ROOM

        def undo() -> None:
            self._prefixes.end(job.id)  # first, so that nobody is led to pages that are free
            kv.release()

        async with self.admission.room(job.order, take, undo):
            try:
                shared = prefix.tokens // size
                if self._reader is not None and prefix.keys:
                    await self._reader.read(job.spec, prefix, usable)
                blocks = [LiveBlock(page, prefix.provenance) for page in kv.page_ids[shared : prefix.tokens // size]]
                came = partial(self._prefixes.came, job.id, shared, blocks)
                if kv.coming is None:
                    came()
                else:
                    kv.coming.whole(came)
            except BaseException:
                undo()
                raise
            job.place(prefix, size)
            yield

    def _reserve(self, kv: LiveKV, tokens: int) -> bool:
        """Take pages for `tokens`, if that leaves one to grow into for each request that has a place already."""
        others = self._requests - self.admission.free_requests
        need = -(-tokens // self._pool.block_tokens) - len(kv.page_ids)
        if others and need + others > self._pool.pages.free:
            return False
        try:
            kv.reserve(tokens)
        except CapacityError:
            return False
        return True
