"""Moves a block's bytes between frames and the arena, off the event loop where a copy would hold it up.

A block's payload is its present layers, base first. Each layer has pages of its own, so a range of the payload can touch several.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from kvstore.arena import Arena, Extent
from kvstore.block import BlockHeader, Buffer
from kvstore.errors import InvalidInputError

from .config import FRAME_BYTES

Layers = Sequence[tuple[Extent, ...]]


class BlockWriter:
    """Takes one block's payload piece by piece, in order, into its pages; checks each layer's CRC-32C on the way.

    Parameters
    ----------
    header : BlockHeader
    layers : sequence of tuple of Extent
        The pages reserved for each layer.
    arena : Arena
    """

    def __init__(self, header: BlockHeader, layers: Layers, arena: Arena) -> None:
        self._header = header
        self._layers = layers
        self._arena = arena
        self._layer = 0
        self._offset = 0
        self._crc = 0
        self.left = header.payload_bytes

    def write(self, data: memoryview) -> None:
        """Store the next piece.

        Raises
        ------
        InvalidInputError
            For more bytes than the header says.
        CorruptBlockError
            When a layer is complete and its CRC does not match.
        """
        if len(data) > self.left:
            raise InvalidInputError("the payload is longer than its header says; send exactly the bytes of the present layers")
        self.left -= len(data)
        while len(data):
            row, extents = self._header.rows[self._layer], self._layers[self._layer]
            piece = data[: row.size_bytes - self._offset]
            self._crc = self._arena.write(extents, self._offset, piece, self._crc)
            self._offset += len(piece)
            data = data[len(piece) :]
            if self._offset == row.size_bytes:
                self._header.check_layer(self._layer + 1, self._crc)
                self._layer, self._offset, self._crc = self._layer + 1, 0, 0


class Copier:
    """Runs copies: small ones of a CPU arena at once, others in a thread.

    Parameters
    ----------
    arena : Arena
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._inline = arena.device == "cpu"
        # On the CPU two large puts run side by side, on a GPU a put beside a get.
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="arena-copy")

    async def write(self, writer: BlockWriter, data: memoryview) -> None:
        """`writer.write(data)`, without holding up the loop for more than about a millisecond.

        A cancelled caller is let go only when the thread has ended: its next step may be to free the pages.
        """
        if self._inline and len(data) <= FRAME_BYTES:
            writer.write(data)
            return
        copy = asyncio.get_running_loop().run_in_executor(self._pool, writer.write, data)
        try:
            await asyncio.shield(copy)
        except asyncio.CancelledError:
            while not copy.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([copy])
            raise

    def write_all(self, blocks: Iterable[tuple[BlockHeader, Layers, int]]) -> set[int]:
        """Whole payloads, each from an address, into their pages. The numbers of those that are not as their headers say.

        All in one go, since to hand the interpreter's lock over for each costs more than a small copy.
        """
        copies = self._arena.copies()
        sums = []  # number of the block, what the CRC must be, and which copy has it: -1 for a layer without bytes
        target, page_bytes = self._arena.address, self._arena.page_bytes
        for number, (header, layers, address) in enumerate(blocks):
            for row, extents in zip(header.rows, layers, strict=False):
                left = size = row.size_bytes
                for start, pages in extents:
                    part = min(left, pages * page_bytes)
                    copies.add(target + start * page_bytes, address, part, left < size)
                    address, left = address + part, left - part
                sums.append((number, row.crc32c, len(copies) - 1 if size else -1))
        crcs = [*copies.make(), 0]
        return {number for number, crc, copy in sums if crc != crcs[copy]}

    async def read(self, header: BlockHeader, layers: Layers, offset: int, length: int) -> list[Buffer]:
        """`length` bytes of a payload from `offset` on; on the CPU views of the arena, to be copied before the next await."""
        ranges = list(_ranges(header, layers, offset, length))
        if self._inline:
            return self._gather(ranges)
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._gather, ranges)

    def close(self) -> None:
        """End the threads, after the copies that run."""
        self._pool.shutdown(wait=True)

    def _gather(self, ranges: Sequence[tuple[tuple[Extent, ...], int, int]]) -> list[Buffer]:
        return [piece for extents, offset, length in ranges for piece in self._arena.read(extents, offset, length)]


def _ranges(header: BlockHeader, layers: Layers, offset: int, length: int) -> Iterator[tuple[tuple[Extent, ...], int, int]]:
    """The parts of the layers that make up a range of the payload: extents, offset within them, length."""
    for row, extents in zip(header.rows, layers, strict=False):
        if offset >= row.size_bytes:
            offset -= row.size_bytes
            continue
        part = min(row.size_bytes - offset, length)
        if part:
            yield extents, offset, part
        length -= part
        offset = 0
