"""Layer-wise delivery: of the last blocks of a fetch the payload of the model's lowest layers comes first, then that of the next.

A caller that computes layer by layer begins with what is there. A block is given when its first section is in place, verified as all
others are (`kvstore.block`); blocks whose codec has no sections, and those that are copied out of shared memory, come whole.
"""

from __future__ import annotations

import threading

from kvstore.block import SECTIONS, EncodedBlock
from kvstore.errors import TransportError


class Sections:
    """What has come of blocks that were given before they were whole. May be called from any thread.

    Parameters
    ----------
    last : int
        How many blocks at the end of a fetch come by sections; those before them come whole.
    """

    def __init__(self, last: int) -> None:
        self.last = last
        self._changed = threading.Condition()
        self._begun: dict[int, tuple[EncodedBlock, int]] = {}  # by position: blocks that are not whole, and how many sections are there
        self._given = 0
        self._ended = False

    def begin(self, position: int, block: EncodedBlock) -> None:
        """The first section of a block is in place."""
        with self._changed:
            self._begun[position] = block, 1

    def add(self, position: int) -> None:
        """The next section of a block is in place."""
        with self._changed:
            block, there = self._begun.pop(position)
            if there + 1 < SECTIONS:
                self._begun[position] = block, there + 1
            self._changed.notify_all()

    def give(self, blocks: int) -> None:
        """The first so many blocks of the fetch have been given: that they become whole is promised now."""
        with self._changed:
            self._given = blocks

    def end(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def lacking(self, section: int) -> dict[int, EncodedBlock]:
        """By position: the blocks of which this section, from 1 on, comes next."""
        with self._changed:
            return {position: block for position, (block, there) in self._begun.items() if there == section}

    def unfinished(self) -> list[int]:
        """Positions of the blocks that were given and are not whole."""
        with self._changed:
            return sorted(position for position in self._begun if position < self._given)

    def wait(self, layers: int, timeout_s: float | None = None) -> None:
        """Until of every block that was given the model's first `layers` are in place.

        Raises
        ------
        TransportError
            When the fetch, which has a deadline, has ended without them, or `timeout_s` has passed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._has(layers), timeout_s)
            if not self._has(layers):
                raise TransportError("upper layers of a block did not come")

    def _has(self, layers: int) -> bool:
        begun = self._begun.items()
        return all(block.header.layers_before(there) >= layers for position, (block, there) in begun if position < self._given)
