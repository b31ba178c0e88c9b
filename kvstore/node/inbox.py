"""What comes in on one connection of the door."""

from __future__ import annotations

import asyncio
import socket

from kvstore import door
from kvstore.door import Kind

#: Seconds for each piece of a payload to move.
PIECE_S = 10.0
#: What is smaller is sent together with what is beside it.
SMALL_BYTES = 256 << 10
#: Of a connection that no payloads are expected on.
RESTING_BYTES = 64 << 10
#: Bytes of a payload that are sent, or received at most, at a time: as the processor's own cache holds.
LARGE_BYTES = 1 << 20


class Inbox:
    """Reads in large pieces, whatever the size of the messages.

    Views that it hands out are valid until its next call.
    """

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer
        self._buffer = memoryview(bytearray(RESTING_BYTES))
        self._start = self._stop = 0

    def grow(self) -> None:
        """Make room for payloads."""
        self._resize(LARGE_BYTES)

    def shrink(self) -> None:
        """Payloads are not expected any more."""
        if self._stop - self._start <= RESTING_BYTES:
            self._resize(RESTING_BYTES)

    def _resize(self, size: int) -> None:
        if len(self._buffer) != size:
            held = self._buffer[self._start : self._stop]
            self._buffer, self._start, self._stop = memoryview(bytearray(size)), 0, len(held)
            self._buffer[: len(held)] = held

    async def message(self) -> tuple[Kind, memoryview]:
        """The next message; it may be waited for for ever. Raises TransportError for what is none, ConnectionError at the end."""
        kind, size = door.parse_frame(await self.exactly(door.FRAME.size, first_s=None), door.MAX_REQUEST_BYTES)
        return kind, await self.exactly(size)

    async def exactly(self, size: int, first_s: float | None = PIECE_S) -> memoryview:
        """The next `size` bytes. The first may take `first_s` seconds (None: for ever), the others PIECE_S each."""
        patience_s = first_s if self._start == self._stop else PIECE_S
        if size > len(self._buffer):
            whole, at = memoryview(bytearray(size)), 0
            while at < size:
                part = await self.some(size - at)
                whole[at : at + len(part)] = part
                at += len(part)
            return whole
        while self._stop - self._start < size:
            await self._more(size, patience_s)
            patience_s = PIECE_S
        return self._take(size)

    async def some(self, limit: int) -> memoryview:
        """At least one of the next bytes, at most `limit`."""
        if self._start == self._stop:
            await self._more(1, PIECE_S)
        return self._take(min(limit, self._stop - self._start))

    def _take(self, size: int) -> memoryview:
        self._start += size
        return self._buffer[self._start - size : self._start]

    async def _more(self, wanted: int, patience_s: float | None) -> None:
        held = self._stop - self._start
        if self._start and (not held or self._start + wanted > len(self._buffer)):
            self._buffer[:held] = bytes(self._buffer[self._start : self._stop])
            self._start, self._stop = 0, held
        async with asyncio.timeout(patience_s):
            got = await asyncio.get_running_loop().sock_recv_into(self._peer, self._buffer[self._stop :])
        if not got:
            raise ConnectionError("the connection has ended")
        self._stop += got
