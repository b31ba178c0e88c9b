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
#: A slot is offered in parts of so many bytes: the node takes one while the next is written.
PART_BYTES = 2 << 20
#: Pieces of blocks in one slot.
MAX_PIECES = 512


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
        self._begun: Rest | None = None

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

    def begin(self, line: Line, blocks: Sequence[tuple[EncodedBlock, int]]) -> bool:
        """Write as much as one slot holds, which waits for nothing; `write` with the same blocks goes on. True where that was all."""
        self._begun = Rest(blocks)
        self._write_slot(line, 0, self._begun)
        return not self._begun

    def write(self, line: Line, blocks: Sequence[tuple[EncodedBlock, int]]) -> bytes:
        """Put blocks. Returns a status for each."""
        statuses, slots, rest = bytearray(), 0, Rest(blocks)
        if self._begun is not None:
            slots, rest, self._begun = 1, self._begun, None
        while rest:
            if slots >= SLOTS:  # this slot is free when what last used it has been answered
                statuses += line.receive(Kind.STATUSES)
            self._write_slot(line, slots % SLOTS * self._slot, rest)
            slots += 1
        for _ in range(min(slots, SLOTS)):
            statuses += line.receive(Kind.STATUSES)
        return bytes(statuses)

    def _write_slot(self, line: Line, at: int, rest: Rest) -> None:
        """Offer and write what is next, as much as the slot at `at` holds."""
        stop, left, kind = at + self._slot, MAX_PIECES, Kind.PART
        while kind is Kind.PART:
            parts: list[bytes] = []
            sources: list[tuple[int, list[np.ndarray]]] = []
            begin = at
            while rest and at < stop and at - begin < PART_BYTES and left:
                header, tokens, layers = rest.take(stop - at)
                size = sum(map(len, layers))
                parts += (door.OFFER.pack(tokens, at, size, len(header)), header)
                sources.append((at, layers))
                at, left = at - (-size // ALIGNMENT) * ALIGNMENT, left - 1
            line.send([door.message(Kind.OFFER, *parts)])  # the node reads the headers meanwhile
            self._fill(sources)
            if not rest or at >= stop or not left:
                kind = Kind.FILLED
            line.send([door.message(kind)])

    def _fill(self, sources: Sequence[tuple[int, list[np.ndarray]]]) -> None:
        for at, layers in sources:
            for layer in layers:
                self._memory[at : at + len(layer)] = layer
                at += len(layer)


class Rest:
    """What of some blocks has not been written yet."""

    def __init__(self, blocks: Sequence[tuple[EncodedBlock, int]]) -> None:
        self._blocks = blocks
        self._next = 0  # block
        self._layers: list[np.ndarray] = []  # of the block that is being written, the next one last

    def __bool__(self) -> bool:
        return bool(self._layers) or self._next < len(self._blocks)

    def take(self, limit: int) -> tuple[bytes, int, list[np.ndarray]]:
        """Header and tokens of the block that is next, no header in its middle, and its next bytes, at most `limit`."""
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
