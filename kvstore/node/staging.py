"""Memory into which a guest of this host writes what it puts (`kvstore.door`, STAGE and OFFER).

The node makes it, so that its size cannot change, and only reads it. What a guest writes there while the node copies can spoil the
guest's own block at most: the copy is checked, not the original.
"""

from __future__ import annotations

import asyncio
import mmap
import os

from kvstore import door
from kvstore.arena import sealed_memory
from kvstore.errors import TransportError

from .config import FRAME_BYTES, MAX_FRAME_BYTES
from .handlers.put import Incoming
from .status import Status
from .wire import PutFrame

STAGE_BYTES = 16 << 20
#: Guests that may have one at a time; others send their blocks over the connection.
MAX_STAGES = 8


class Stages:
    """Hands them out."""

    def __init__(self) -> None:
        self.count = 0

    def open(self) -> Stage | None:
        """One more, None where there are enough."""
        return Stage(self) if self.count < MAX_STAGES else None


class Stage:
    """That of one guest."""

    def __init__(self, stages: Stages) -> None:
        self.fd = sealed_memory("concertina-stage", STAGE_BYTES)
        self._map = mmap.mmap(self.fd, STAGE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ)
        self._view = memoryview(self._map)
        self._stages = stages
        stages.count += 1

    def close(self) -> None:
        """Give it back. Views that are still about keep the memory alive."""
        os.close(self.fd)
        self._stages.count -= 1

    def relax(self) -> None:
        """Leave its pages to the guest, until they are read again."""
        self._map.madvise(mmap.MADV_DONTNEED)

    async def take(self, body: memoryview, incoming: Incoming) -> list[Status]:
        """Take the pieces of an OFFER. Returns the outcome of each block that ends there; one that does not is left open in `incoming`.

        Raises
        ------
        InvalidInputError, TransportError
            For what is no offer; blocks before it stay.
        """
        copied, before = 0, len(incoming.statuses)
        for tokens, offset, size, header in door.split_offers(body):
            if size > STAGE_BYTES or offset > STAGE_BYTES - size:
                raise TransportError("an offer lies outside of its memory")
            first, index = (header, incoming.next_index) if len(header) else (None, len(incoming.statuses))
            for at in range(0, max(size, 1), MAX_FRAME_BYTES):
                payload = self._view[offset + at : offset + min(size, at + MAX_FRAME_BYTES)]
                await incoming.take(PutFrame(index, None if at else first, payload, tokens))
            copied += size
            if copied >= FRAME_BYTES:
                copied = 0
                await asyncio.sleep(0)
        incoming.pause()
        return incoming.statuses[before:]
