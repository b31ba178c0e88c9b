"""What a node sends from its arena's own memory: all of it, as it was when it was given out."""

from __future__ import annotations

import asyncio
import socket

from kvstore.node import door as node_door
from kvstore.node.door import Guest


def received(peer: socket.socket, size: int) -> bytes:
    parts, peer_bytes = [], 0
    while peer_bytes < size:
        parts.append(peer.recv(size - peer_bytes))
        peer_bytes += len(parts[-1])
    return b"".join(parts)


async def test_what_the_kernel_does_not_take_at_once_is_what_was_there(monkeypatch):
    monkeypatch.setattr(node_door, "MAX_PARTS", 7)
    mine, others = socket.socketpair()
    with mine, others:
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
        mine.setblocking(False)
        guest, wanted = Guest(None, mine, None, None, None, None), b""
        arena = bytearray(200_000)
        reading = None
        for number in range(40):
            arena[:] = bytes([number]) * len(arena)  # another block took the place
            size = (3, 0, 150_000, 5_000, 17)[number % 5]
            piece = memoryview(arena)[number : number + size]
            wanted += bytes(piece)
            if size > 100_000 and reading is None:
                reading = asyncio.create_task(asyncio.to_thread(received, others, sum((3, 0, 150_000, 5_000, 17)) * 8))
            rest = guest._send_now([memoryview(b""), piece])
            piece.release()
            arena[:] = bytes(len(arena))
            await guest._send(rest)
        assert await asyncio.wait_for(reading, 30) == wanted


async def test_pieces_go_together_and_in_order(monkeypatch):
    monkeypatch.setattr(node_door, "MAX_PARTS", 7)
    mine, others = socket.socketpair()
    with mine, others:
        mine.setblocking(False)
        guest = Guest(None, mine, None, None, None, None)
        for number in range(20):
            await guest._send_later(bytes([number]))
        others.setblocking(False)
        assert others.recv(100) == bytes(range(14)), "as many as one call sends"
        await guest._flush()
        await guest._flush()
        assert others.recv(100) == bytes(range(14, 20))
