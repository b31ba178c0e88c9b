"""From the messages of one Get stream to verified blocks."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

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

    async def read(self, number: int, accept: Callable[[BlockHeader], bool]) -> EncodedBlock | None:
        """The next block, which must be the call's `number`-th.

        Parameters
        ----------
        accept : callable
            Looks at the verified header before any memory is set aside; False refuses the block.

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
        if not accept(header):
            return None
        if len(first.payload) == header.payload_bytes:
            return EncodedBlock.verify(header, first.payload)  # where it lies
        assembly, piece = Assembly(header, self._buffers.take(header.payload_bytes)), first.payload
        run = self._at_once if header.payload_bytes < self._offload_bytes else self._in_thread
        copied = run(assembly, piece)
        while assembly.left:  # a piece is put in its place while the next one comes
            frame = await self._next(number)
            await copied
            if frame is None:
                return None
            if not frame.payload:
                raise CorruptBlockError("an empty frame came in the middle of a block")
            copied = run(assembly, frame.payload)
        await copied
        return assembly.block()

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
    """A payload in the making: pieces in order, each layer's CRC-32C compared as soon as it is whole.

    Parameters
    ----------
    header : BlockHeader
    buffer : memoryview
        Of its payload's size.
    """

    def __init__(self, header: BlockHeader, buffer: memoryview) -> None:
        self.left = header.payload_bytes
        self._header = header
        self._buffer = buffer
        self._parts: list[memoryview] = []
        self._start = self._at = self._crc = 0

    def expect(self, piece: memoryview) -> None:
        """Count a piece that is going to be added. Raises CorruptBlockError if there is no room for it."""
        if len(piece) > self.left:
            raise CorruptBlockError(f"more payload came than the header's {self._header.payload_bytes} bytes")
        self.left -= len(piece)

    def add(self, piece: memoryview) -> None:
        """Copy the next piece, without the interpreter's lock. Raises CorruptBlockError for a layer that does not certify itself."""
        self._end_layers()
        while len(piece):
            row = self._header.rows[len(self._parts)]
            size = min(len(piece), self._start + row.size_bytes - self._at)
            self._crc = copy_checked(self._buffer[self._at :], piece[:size], self._crc)
            self._at, piece = self._at + size, piece[size:]
            self._end_layers()

    def block(self) -> EncodedBlock:
        """The block, once nothing is left."""
        return EncodedBlock(self._header, tuple(self._parts))

    def _end_layers(self) -> None:
        """Close the layers that are whole; one may be empty."""
        rows = self._header.rows
        while len(self._parts) < self._header.present and self._at - self._start == rows[len(self._parts)].size_bytes:
            self._header.check_layer(len(self._parts) + 1, self._crc)
            self._parts.append(self._buffer[self._start : self._at])
            self._start, self._crc = self._at, 0
