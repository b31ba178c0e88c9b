"""One fetch's state, which its streams share: what has come, what may still come, and the prefix as far as it has grown."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.block import BlockHeader, EncodedBlock
from kvstore.errors import CorruptBlockError
from kvstore.identity import NO_PARENT

from .config import ClientConfig
from .lookup import Hit
from .sections import Sections

#: Called with the position and the block, in order, from the event loop.
OnBlock = Callable[[int, EncodedBlock], None]


@dataclass(frozen=True, slots=True)
class Fetched:
    """The verified leading blocks of a fetch, and the bytes that came over the wire for it."""

    blocks: list[EncodedBlock]
    bytes_fetched: int


@dataclass(frozen=True, slots=True)
class Demand:
    """What a block must satisfy to be used."""

    namespace: bytes
    parent_of_first: bytes = NO_PARENT
    max_distortion: float = 0.0
    input_tokens: int = 0


class Fetch:
    """One call of `KvClient.fetch`: the state shared by its streams."""

    def __init__(self, hits: Sequence[Hit], demand: Demand, config: ClientConfig, sections: Sections | None) -> None:
        self.hits = hits
        self.demand = demand
        self.sections = sections
        self.config = config
        self.blocks: list[EncodedBlock] = []
        self.bytes_fetched = 0
        self.corrupt = 0
        self.expired = False
        self._arrived: dict[int, EncodedBlock] = {}
        self._limit = len(hits)  # nothing from this position on can be used
        self._progress = asyncio.Event()
        self._claimed_bytes = 0
        self._claiming = threading.Lock()

    def wanted(self, position: int) -> bool:
        """Whether a block at `position` can still become part of the prefix."""
        return position < self._limit

    def whole_ones(self, positions: Sequence[int]) -> list[int]:
        """Those before the last ones, which come by sections."""
        return [p for p in positions if p < len(self.hits) - self.sections.last]

    def miss(self, position: int) -> None:
        """Cut the prefix before `position`."""
        self._limit = min(self._limit, position)
        self._progress.set()

    def arrived(self, blocks: Sequence[tuple[int, EncodedBlock]]) -> None:
        """Take verified blocks, or further sections of them; `deliver` hands each block out when its turn comes."""
        self._arrived.update(blocks)
        self._progress.set()

    def lacking(self, positions: Sequence[int], section: int) -> list[int]:
        """Which blocks a section is to be asked for of."""
        if section:
            begun = self.begun(section)
            return [p for p in positions if p in begun and self.wanted(p)]
        return [p for p in positions if p >= len(self.blocks) and p not in self._arrived and self.wanted(p)]

    def begun(self, section: int | None) -> dict[int, EncodedBlock]:
        """By position: the blocks that a section is to be added to; none yet for the first, nor for whole blocks."""
        return self.sections.lacking(section) if section else {}

    def placed(self, blocks: Sequence[tuple[int, EncodedBlock]], section: int) -> Sequence[tuple[int, EncodedBlock]]:
        """A section of each is there. May be called from any thread. Returns what `arrived` is to be told of: those that begin."""
        for position, block in blocks:
            if section:
                self.sections.add(position)
            elif block.header.sections:
                self.sections.begin(position, block)
        return () if section else blocks

    def count(self, size_bytes: int) -> None:
        """Count bytes that came. May be called from any thread."""
        with self._claiming:
            self.bytes_fetched += size_bytes

    async def deliver(self, on_block: OnBlock | None) -> None:
        """Grow the prefix as blocks arrive, until it cannot grow any more."""
        while self.wanted(at := len(self.blocks)):
            block = self._arrived.pop(at, None)
            if block is None:
                self._progress.clear()
                await self._progress.wait()
            elif block.header.parent != (self.hits[at - 1].key if at else self.demand.parent_of_first):
                self.corrupt += 1
                self._limit = at
            else:
                self.blocks.append(block)
                if self.sections is not None:
                    self.sections.give(at + 1)
                if on_block is not None:
                    on_block(at, block)

    async def finish(self) -> None:
        """Until all blocks that were delivered are whole, or one never will be."""
        while self.sections is not None and (unfinished := self.sections.unfinished()) and self.wanted(unfinished[-1]):
            self._progress.clear()
            await self._progress.wait()

    def whole(self) -> list[EncodedBlock]:
        """The prefix as far as its blocks are whole."""
        unfinished = self.sections.unfinished() if self.sections is not None else []
        return self.blocks[: unfinished[0]] if unfinished else self.blocks

    def check(self, positions: Sequence[int], headers: Sequence[BlockHeader]) -> int:
        """How many leading blocks with these headers may be used, and there is room for. May be called from any thread.

        Raises
        ------
        CorruptBlockError
            If the first is not the block that was asked for.
        """
        with self._claiming:
            for number, (position, header) in enumerate(zip(positions, headers, strict=False)):
                try:
                    size = self._size_of(position, header)
                except CorruptBlockError:
                    if number:
                        return number
                    raise
                if self._claimed_bytes + size > self.config.fetch_bytes or not self._is_exact(header):
                    return number
                self._claimed_bytes += size
        return min(len(positions), len(headers))

    def _size_of(self, position: int, header: BlockHeader) -> int:
        if header.key != self.hits[position].key or header.namespace != self.demand.namespace:
            raise CorruptBlockError("the node sent another block than the one asked for")
        size = header.total_bytes
        if size > self.config.max_block_bytes:
            raise CorruptBlockError(f"a block of {size} bytes is above max_block_bytes = {self.config.max_block_bytes}")
        return size

    def _is_exact(self, header: BlockHeader) -> bool:
        bound = self.demand.max_distortion
        if bound <= 0:
            return True
        own, before = header.rows[header.present - 1].distortion, header.provenance.distortion
        return all(error <= bound for error in (own.keys, own.values, before.keys, before.values))
