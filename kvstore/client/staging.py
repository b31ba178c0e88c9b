"""Puts to a node of this host: payloads are written into memory that both sides see, and only their headers go over the connection.

The node copies them out, checks the copy, and says so; until then their slot of the memory is not written again. The client fills one
slot while the node empties others; a block may go on in the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvstore import door
from kvstore.block import EncodedBlock
from kvstore.door import Kind

from .buffers import ALIGNMENT
from .line import Line, map_memory

#: Parts of the memory that are filled and emptied in turns. With more and smaller ones the node commits more often, which costs more than
#: what could be done side by side.
SLOTS = 2
#: The node begins after so many bytes, while the next are written; but what is together no more than UNDIVIDED_BYTES goes in one message.
FIRST_BYTES, UNDIVIDED_BYTES = 1 << 20, 4 << 20
#: Blocks of one message.
MAX_BLOCKS = 512


class Stage:
    """Memory of one connection.

    Parameters
    ----------
    memory : uint8 [bytes]
        Writable, and shared with the node; empty where the node has none to give.
    """

    def __init__(self, memory: np.ndarray) -> None:
        self._memory = memory
        self._slot = len(memory) // SLOTS // ALIGNMENT * ALIGNMENT

    @property
    def open(self) -> bool:
        """Whether there is memory to write to."""
        return self._slot > 0

    @classmethod
    def ask(cls, line: Line) -> Stage:
        """Ask the node for memory."""
        line.send([door.message(Kind.STAGE)])
        size_bytes, descriptor, _ = line.receive_memory(Kind.STAGED)
        return cls(np.empty(0, np.uint8) if descriptor is None else map_memory(descriptor, size_bytes, writable=True))

    def write(self, line: Line, blocks: Sequence[tuple[EncodedBlock, int]]) -> bytes:
        """Put blocks. Returns a status for each."""
        statuses, offered, rest = bytearray(), 0, Rest(blocks)
        small = sum(block.header.payload_bytes for block, _ in blocks) <= UNDIVIDED_BYTES
        first = min(UNDIVIDED_BYTES if small else FIRST_BYTES, self._slot)
        while rest:
            if offered >= SLOTS:  # this slot is free when the message that last used it has been answered
                statuses += line.receive(Kind.STATUSES)
            offer, sources = self._offer(offered % SLOTS * self._slot, self._slot if offered else first, rest)
            line.send([offer])  # the node reads the headers meanwhile
            self._fill(sources)
            line.send([door.message(Kind.FILLED)])
            offered += 1
        for _ in range(min(offered, SLOTS)):
            statuses += line.receive(Kind.STATUSES)
        return bytes(statuses)

    def _offer(self, start: int, limit: int, rest: Rest) -> tuple[bytes, list[tuple[int, np.ndarray]]]:
        """The message that offers what is next from `start` on, at most `limit` bytes of it, and what must be copied where for that."""
        parts: list[bytes] = []
        sources: list[tuple[int, np.ndarray]] = []
        at, stop = start, start + limit
        while rest and at < stop and len(parts) < 2 * MAX_BLOCKS:
            header, tokens, pieces = rest.take(stop - at)
            first = at
            for piece in pieces:
                sources.append((at, piece))
                at += len(piece)
            parts += (door.OFFER.pack(tokens, first, at - first, len(header)), header)
            at = -(-at // ALIGNMENT) * ALIGNMENT
        return door.message(Kind.OFFER, *parts), sources

    def _fill(self, sources: Sequence[tuple[int, np.ndarray]]) -> None:
        for at, source in sources:
            self._memory[at : at + len(source)] = source


class Rest:
    """What of some blocks has not been written yet."""

    def __init__(self, blocks: Sequence[tuple[EncodedBlock, int]]) -> None:
        self._blocks = blocks
        self._next = 0  # block
        self._layers: list[np.ndarray] = []  # of the block that is being written, the next one last

    def __bool__(self) -> bool:
        return bool(self._layers) or self._next < len(self._blocks)

    def take(self, limit: int) -> tuple[bytes, int, list[np.ndarray]]:
        """Header and tokens of the block that is next, no header in its middle, and its next pieces, at most `limit` bytes in all."""
        header, pieces = b"", []
        if not self._layers:
            block, _ = self._blocks[self._next]
            header = block.header.to_bytes()
            self._layers = [np.frombuffer(layer, np.uint8) for layer in reversed(block.payload) if len(layer)]
            self._next += 1
        while self._layers and limit:
            layer = self._layers.pop()
            if len(layer) > limit:
                self._layers.append(layer[limit:])
                layer = layer[:limit]
            limit -= len(layer)
            pieces.append(layer)
        return header, self._blocks[self._next - 1][1], pieces
