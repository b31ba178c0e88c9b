"""A TCP proxy that can be told to spoil what passes: for the wire to a node, and for Redis that is slow, gone, or somebody else."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress

UP, DOWN = "up", "down"
#: Takes direction and bytes; returns the pieces to pass on. Raises ConnectionError to break the connection.
Rule = Callable[[str, bytes], Awaitable[list[bytes]]]


class TcpProxy:
    """Passes bytes from its own port on 127.0.0.1 to `target` (host, port), through `rule` where there is one."""

    def __init__(self, host: str, port: int) -> None:
        self.target = (host, port)
        self.rule: Rule | None = None
        self.refusing = False
        self.port = 0
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self._server.close()
        self.cut()

    def cut(self) -> None:
        """Break all connections that are open now."""
        for writer in self._open:
            writer.transport.abort()

    def heal(self) -> None:
        """Pass everything on again, on new connections."""
        self.rule, self.refusing = None, False
        self.cut()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            writer.transport.abort()
            return
        try:
            other_reader, other_writer = await asyncio.open_connection(*self.target)
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, other_writer}
        self._open |= ends
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(UP, reader, other_writer))
                group.create_task(self._pump(DOWN, other_reader, writer))
        except* (OSError, asyncio.IncompleteReadError):
            pass  # either end broke: so does the other
        finally:
            self._open -= ends
            for end in ends:
                end.transport.abort()

    async def _pump(self, direction: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            for piece in await self.rule(direction, data) if self.rule else [data]:
                writer.write(piece)
            await writer.drain()
        with suppress(OSError, RuntimeError):
            writer.write_eof()


def delay(seconds: float) -> Rule:
    """Each piece comes later."""

    async def rule(direction: str, data: bytes) -> list[bytes]:
        await asyncio.sleep(seconds)
        return [data]

    return rule


def black_hole(*directions: str) -> Rule:
    """Nothing comes through, and nobody is told: a half-open connection."""

    async def rule(direction: str, data: bytes) -> list[bytes]:
        return [] if direction in directions else [data]

    return rule


def truncate(direction: str, after_bytes: int) -> Rule:
    """So many bytes pass, then the connection breaks."""
    left = after_bytes

    async def rule(which: str, data: bytes) -> list[bytes]:
        nonlocal left
        if which == direction:
            left -= len(data)
            if left < 0:
                raise ConnectionResetError("truncated")
        return [data]

    return rule


def flip(rng: random.Random, direction: str, chance: float) -> Rule:
    """A bit of a piece changes."""

    async def rule(which: str, data: bytes) -> list[bytes]:
        if which != direction or rng.random() >= chance:
            return [data]
        damaged = bytearray(data)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        return [bytes(damaged)]

    return rule


def shuffle(rng: random.Random, direction: str, chance: float) -> Rule:
    """The halves of a piece change places."""

    async def rule(which: str, data: bytes) -> list[bytes]:
        half = len(data) // 2
        return [data[half:], data[:half]] if which == direction and rng.random() < chance else [data]

    return rule


def repeat(rng: random.Random, direction: str, chance: float) -> Rule:
    """A piece comes twice."""

    async def rule(which: str, data: bytes) -> list[bytes]:
        return [data, data] if which == direction and rng.random() < chance else [data]

    return rule


def lose(rng: random.Random, direction: str, chance: float) -> Rule:
    """A piece is missing."""

    async def rule(which: str, data: bytes) -> list[bytes]:
        return [] if which == direction and rng.random() < chance else [data]

    return rule


def answer_with(reply: Callable[[bytes], bytes]) -> Rule:
    """What comes down is replaced."""

    async def rule(direction: str, data: bytes) -> list[bytes]:
        return [reply(data)] if direction == DOWN else [data]

    return rule


def previous_answer() -> Rule:
    """Every answer is the one that belongs to the question before."""
    last = b""

    async def rule(direction: str, data: bytes) -> list[bytes]:
        nonlocal last
        if direction == UP:
            return [data]
        last, now = data, last
        return [now] if now else [data]

    return rule
