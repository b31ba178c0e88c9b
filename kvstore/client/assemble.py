"""From the messages of one Get stream to verified blocks."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from kvstore.block import BlockHeader, EncodedBlock
from kvstore.checked_copy import copy_checked
from kvstore.errors import CorruptBlockError

from .buffers import Buffers
from .frames import GetFrame, parse_get

#: `BlockStatus.BLOCK_STATUS_OK`
OK = 1


class BlockReader:
    """Reads the blocks of a Get call in the order asked.

    Parameters
    ----------
    messages : async iterator of bytes
        Serialized `GetResponse` messages.
    offload_bytes : int
        Payloads of several frames are put together and verified in a thread from this size on, while the next frame comes.
    buffers : Buffers, optional
        Where payloads of several frames are put together; memory of their own by default.
    """

    def __init__(self, messages: AsyncIterator[bytes], offload_bytes: int, buffers: Buffers | None = None) -> None:
        self.bytes_read = 0
        self._messages = messages
        self._parsed: deque[GetFrame] = deque()
        self._offload_bytes = offload_bytes
        self._buffers = buffers or Buffers(0)

    async def read(
        self, number: int, accept: Callable[[BlockHeader], bool], section: int | None = None, block: EncodedBlock | None = None
    ) -> EncodedBlock | None:
        """The next block, which must be the call's `number`-th.

        Parameters
        ----------
        accept : callable
            Looks at the verified header before any memory is set aside; False refuses the block.
        section : int, optional
            Where the call asks for a section of each block alone: which. A block without sections comes whole as the first.
        block : EncodedBlock, optional
            What the first section began, for the others to be added to.

        Returns
        -------
        EncodedBlock or None
            None when the node does not have it, gave it up half-way, or `accept` refused it.

        Raises
        ------
        CorruptBlockError
            For bytes that do not certify themselves, or frames out of order.
        """
        first = await self._next(number)
        if first is None:
            return None
        header = BlockHeader.from_bytes(first.header)
        if block is None:
            if not accept(header):
                return None
            if section is None or not header.sections:
                return await self._whole(number, header, first.payload)
            block = EncodedBlock(header, (self._buffers.take(header.payload_bytes),))
        elif header != block.header:
            return None  # another took its place
        assembly = Assembly.of_section(block, section)
        return block if await self._assemble(number, assembly, first.payload) else None

    async def _whole(self, number: int, header: BlockHeader, piece: memoryview) -> EncodedBlock | None:
        if len(piece) == header.payload_bytes:
            return EncodedBlock.verify(header, piece)  # where it lies
        assembly = Assembly.of_block(header, self._buffers.take(header.payload_bytes))
        return EncodedBlock(header, assembly.parts) if await self._assemble(number, assembly, piece) else None

    async def _assemble(self, number: int, assembly: Assembly, piece: memoryview) -> bool:
        """Whether all of it came, from the first piece on."""
        run = self._at_once if assembly.left < self._offload_bytes else self._in_thread
        copied = run(assembly, piece)
        while assembly.left:  # a piece is put in its place while the next one comes
            frame = await self._next(number)
            await copied
            if frame is None:
                return False
            if not frame.payload:
                raise CorruptBlockError("an empty frame came in the middle of a block")
            copied = run(assembly, frame.payload)
        await copied
        return True

    @staticmethod
    def _at_once(assembly: Assembly, piece: memoryview) -> asyncio.Future[None]:
        done = asyncio.get_running_loop().create_future()
        assembly.expect(piece)
        assembly.add(piece)
        done.set_result(None)
        return done

    @staticmethod
    def _in_thread(assembly: Assembly, piece: memoryview) -> asyncio.Future[None]:
        assembly.expect(piece)
        return asyncio.get_running_loop().run_in_executor(None, assembly.add, piece)

    async def _next(self, number: int) -> GetFrame | None:
        """The next frame of the block; None at the end of the stream, and for any status but OK."""
        if not self._parsed:
            try:
                message = await anext(self._messages)
            except StopAsyncIteration:
                return None
            self.bytes_read += len(message)
            self._parsed.extend(parse_get(message))
        frame = self._parsed.popleft()
        if frame.index != number:
            raise CorruptBlockError(f"a frame of block {frame.index} came where {number} was due")
        return frame if frame.status == OK else None


class Assembly:
    """A payload in the making: pieces in order, the CRC-32C of each part compared as soon as it is whole.

    Parameters
    ----------
    buffer : memoryview
        Of the size of all parts.
    sizes : sequence of int
        Of each part in bytes.
    check : callable
        Given the number of a part and its CRC-32C; raises CorruptBlockError when that is another's.
    """

    def __init__(self, buffer: memoryview, sizes: Sequence[int], check: Callable[[int, int], None]) -> None:
        self.left = sum(sizes)
        self._buffer = buffer
        self._sizes = sizes
        self._check = check
        self._parts: list[memoryview] = []
        self._start = self._at = self._crc = 0

    @classmethod
    def of_block(cls, header: BlockHeader, buffer: memoryview) -> Assembly:
        """Of a whole payload, whose parts are its layers of precision."""
        sizes = [row.size_bytes for row in header.rows[: header.present]]
        return cls(buffer, sizes, lambda part, crc: header.check_layer(part + 1, crc))

    @classmethod
    def of_section(cls, block: EncodedBlock, section: int) -> Assembly:
        """Of one section, to its place in the payload of `block`."""
        (part,) = block.section(section)
        return cls(memoryview(part), [len(part)], lambda _, crc: block.header.check_section(section, crc))

    @property
    def parts(self) -> tuple[memoryview, ...]:
        """All of them, once nothing is left."""
        return tuple(self._parts)

    def expect(self, piece: memoryview) -> None:
        """Count a piece that is going to be added. Raises CorruptBlockError if there is no room for it."""
        if len(piece) > self.left:
            raise CorruptBlockError(f"more payload came than was due, by {len(piece) - self.left} bytes")
        self.left -= len(piece)

    def add(self, piece: memoryview) -> None:
        """Copy the next piece, without the interpreter's lock. Raises CorruptBlockError for a part that does not certify itself."""
        self._end_parts()
        while len(piece):
            size = min(len(piece), self._start + self._sizes[len(self._parts)] - self._at)
            self._crc = copy_checked(self._buffer[self._at :], piece[:size], self._crc)
            self._at, piece = self._at + size, piece[size:]
            self._end_parts()

    def _end_parts(self) -> None:
        """Close the parts that are whole; one may be empty."""
        while len(self._parts) < len(self._sizes) and self._at - self._start == self._sizes[len(self._parts)]:
            self._check(len(self._parts), self._crc)
            self._parts.append(self._buffer[self._start : self._at])
            self._start, self._crc = self._at, 0
