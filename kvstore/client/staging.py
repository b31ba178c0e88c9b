"""Puts to a node of this host: payloads are written into memory that both sides see, and only their headers go over the connection.

The node copies them out, checks the copy, and says so; until then their half of the memory is not written again. The client fills one half
while the node empties the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvstore import door
from kvstore.block import EncodedBlock
from kvstore.door import Kind

from .buffers import ALIGNMENT
from .line import Line, map_memory

#: The node begins after so many bytes, while the next are written.
FIRST_BYTES = 1 << 20
#: Blocks of one message.
MAX_BLOCKS = 512


class Stage:
    """Memory of one connection.

    Parameters
    ----------
    memory : uint8 [bytes]
        Writable, and shared with the node.
    """

    def __init__(self, memory: np.ndarray) -> None:
        self._memory = memory
        self._half = len(memory) // 2

    @classmethod
    def ask(cls, line: Line) -> Stage:
        """Ask the node for memory. One that has none to give answers with none, into which nothing fits."""
        line.send([door.message(Kind.STAGE)])
        size_bytes, descriptor = line.receive_memory(Kind.STAGED)
        return cls(np.empty(0, np.uint8) if descriptor is None else map_memory(descriptor, size_bytes, writable=True))

    def fits(self, block: EncodedBlock) -> bool:
        """Whether a block can go this way."""
        return block.header.payload_bytes <= self._half

    def write(self, line: Line, blocks: Sequence[tuple[EncodedBlock, int]]) -> bytes:
        """Put blocks that fit. Returns a status for each."""
        statuses, done, offered = bytearray(), 0, 0
        while done < len(blocks):
            if offered >= 2:  # this half is free when the message before the last has been answered
                statuses += line.receive(Kind.STATUSES)
            message, count = self._fill(offered % 2 * self._half, FIRST_BYTES if not offered else self._half, blocks[done:])
            line.send([message])
            done, offered = done + count, offered + 1
        for _ in range(min(offered, 2)):
            statuses += line.receive(Kind.STATUSES)
        return bytes(statuses)

    def _fill(self, start: int, limit: int, blocks: Sequence[tuple[EncodedBlock, int]]) -> tuple[bytes, int]:
        """Copy the leading blocks to `start`, at least one. Returns the message that offers them, and their number."""
        parts: list[bytes] = []
        at, count = start, 0
        for block, tokens in blocks[:MAX_BLOCKS]:
            size, header = block.header.payload_bytes, block.header.to_bytes()
            if count and at - start + size > limit:
                break
            parts += (door.OFFER.pack(tokens, at, size, len(header)), header)
            for layer in filter(len, block.payload):
                source = np.frombuffer(layer, np.uint8)
                self._memory[at : at + len(source)] = source
                at += len(source)
            at = -(-at // ALIGNMENT) * ALIGNMENT
            count += 1
        return door.message(Kind.OFFER, *parts), count
