"""Memory into which a guest of this host writes what it puts (`kvstore.door`, STAGE, OFFER and FILLED).

The node makes it, so that its size cannot change, and only reads it. What a guest writes there while the node copies can spoil the
guest's own block at most: the copy is checked, not the original.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from kvstore import door
from kvstore.arena import sealed_memory
from kvstore.block import BlockHeader
from kvstore.checked_copy import address_of
from kvstore.errors import TransportError

from .config import FRAME_BYTES, MAX_FRAME_BYTES
from .handlers.put import Incoming, header_of

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
        self._address = address_of(self._map)
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

    def look(self, body: memoryview) -> list[Piece]:
        """The pieces of an OFFER. Raises TransportError for what is none."""
        return [self._piece(*offer) for offer in door.split_offers(body)]

    async def take(self, pieces: Iterable[Piece], incoming: Incoming) -> None:
        """Take pieces that are there now. A block that does not end there is left open in `incoming`.

        Raises
        ------
        InvalidInputError
            For what cannot follow on what was there before; blocks before it stay.
        """
        copied = 0
        for run in _runs(pieces):
            while run:
                if copied >= FRAME_BYTES:
                    copied = 0
                    await asyncio.sleep(0)
                taken = incoming.take_run([piece[:3] for piece in run]) if run[0].whole else 0
                if not taken:
                    await self._take(run[0], incoming)
                copied += sum([piece.size for piece in run[: taken or 1]])
                run = run[taken or 1 :]

    def _piece(self, input_tokens: int, offset: int, size: int, header_bytes: memoryview) -> Piece:
        if size > STAGE_BYTES or offset > STAGE_BYTES - size:
            raise TransportError("an offer lies outside of its memory")
        header = header_of(header_bytes) if len(header_bytes) else None
        whole = header is not None and header.payload_bytes == size
        return Piece(header, input_tokens, self._address + offset, offset, size, len(header_bytes) > 0, whole)

    async def _take(self, piece: Piece, incoming: Incoming) -> None:
        if piece.begins:
            incoming.begin(piece.header, piece.input_tokens)
        stop = piece.offset + piece.size
        for at in range(piece.offset, stop, MAX_FRAME_BYTES):
            await incoming.go_on(self._view[at : min(stop, at + MAX_FRAME_BYTES)])


class Piece(NamedTuple):
    """One of an OFFER; `header` is None in the middle of a block, and where it is damaged."""

    header: BlockHeader | None
    input_tokens: int
    address: int
    offset: int
    size: int
    begins: bool
    whole: bool


def _runs(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Whole blocks of one chain together, as many as may be copied in one go, and all others alone."""
    run: list[Piece] = []
    size = 0
    for piece in pieces:
        size += piece.size
        if run and not (run[-1].whole and piece.whole and piece.header.parent == run[-1].header.key and size <= FRAME_BYTES):
            yield run
            run, size = [], piece.size
        run.append(piece)
    if run:
        yield run
