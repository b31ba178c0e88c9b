"""Blocks of a fetch on their way from the store to the decoder."""

from __future__ import annotations

import asyncio
from collections import deque

from kvstore.block import EncodedBlock
from kvstore.client import Sections


class Arrived:
    """Blocks that have come and wait to be decoded, in order; at most `expected`. Of the last, `sections` may be missing still."""

    def __init__(self, expected: int, sections: Sections | None = None) -> None:
        self.sections = sections
        self.bytes_taken = 0
        self._missing = expected
        self._blocks: deque[EncodedBlock] = deque()
        self._more = asyncio.Event()

    @property
    def left(self) -> int:
        """How many have not been taken, at most."""
        return self._missing + len(self._blocks)

    def ends_within(self, blocks: int) -> bool:
        """Whether no more will come, and at most so many wait."""
        return not self._missing and len(self._blocks) <= blocks

    def put(self, block: EncodedBlock) -> None:
        """One more."""
        self._blocks.append(block)
        self._missing -= 1
        self._more.set()

    def end(self) -> None:
        """No more will come."""
        self._missing = 0
        self._more.set()

    async def next(self) -> EncodedBlock | None:
        """The next one, which stays; None when there will be none."""
        while not self._blocks and self._missing:
            self._more.clear()
            await self._more.wait()
        return self._blocks[0] if self._blocks else None

    async def all(self) -> None:
        """Until no more will come."""
        while self._missing:
            self._more.clear()
            await self._more.wait()

    def take_like(self, like: EncodedBlock, limit: int) -> list[EncodedBlock]:
        """The next ones, as long as they go on from `like`, which is the first, with the same codec; at most `limit`."""
        taken: list[EncodedBlock] = []
        first = like.header
        while self._blocks and len(taken) < limit:
            header = self._blocks[0].header
            start = first.start + len(taken) * first.tokens
            if (header.codec, header.profile, header.tokens, header.start) != (first.codec, first.profile, first.tokens, start):
                break
            taken.append(self._blocks.popleft())
        self.bytes_taken += sum(block.header.total_bytes for block in taken)
        return taken
