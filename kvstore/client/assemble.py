"""From the messages of one Get stream to verified blocks."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from kvstore.block import BlockHeader, EncodedBlock
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
        Payloads from this size on are verified in a thread.
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
        payload = await self._payload(number, header.payload_bytes, first.payload)
        if payload is None:
            return None
        if len(payload) >= self._offload_bytes:
            return await asyncio.to_thread(EncodedBlock.verify, header, payload)
        return EncodedBlock.verify(header, payload)

    async def _payload(self, number: int, size: int, piece: memoryview) -> memoryview | None:
        """All payload bytes of a block. Those of a single frame are used where they lie."""
        if len(piece) == size:
            return piece
        buffer, at = self._buffers.take(size), 0
        while True:
            if len(piece) > size - at:
                raise CorruptBlockError(f"more payload came than the header's {size} bytes")
            buffer[at : at + len(piece)] = piece
            at += len(piece)
            if at == size:
                return buffer
            frame = await self._next(number)
            if frame is None:
                return None
            if not frame.payload:
                raise CorruptBlockError("an empty frame came in the middle of a block")
            piece = frame.payload

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
