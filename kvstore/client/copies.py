"""Second copies of what everybody reads: when the readers of one node queue up, its blocks go to another as well.

Whoever has just fetched a block has its bytes; they are sent on as they are, never decoded and encoded again. A lookup then finds
two holders and reads half of the keys from each. Bounded three ways: only from a node that says that it is busy to one that is not, one
second copy of a block, and so many bytes a second and client. Copies compete for room like any other block and go when they are not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvstore.block import EncodedBlock
from kvstore.clock import Clock
from kvstore.metadata import NodeRecord

from .lookup import Hit

#: Readers under way at one time, on average, from which on a node is busy: they wait for each other.
BUSY_READERS = 6.0
#: A node takes copies while it has at most this share of the busy one's readers.
IDLE_SHARE = 0.5


class HotCopies:
    """Chooses what to copy, and where to.

    Parameters
    ----------
    clock : Clock
    bytes_per_s : int
        Bound of what this client copies; it may save up one second of it.
    """

    def __init__(self, clock: Clock, bytes_per_s: int) -> None:
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._allowance = float(bytes_per_s)
        self._since = clock.now()

    def choose(
        self, hits: Sequence[Hit], blocks: Sequence[EncodedBlock], nodes: Mapping[str, NodeRecord]
    ) -> tuple[str, list[EncodedBlock]] | None:
        """The incarnation that copies go to, and the blocks; None while no copy is called for.

        Parameters
        ----------
        hits, blocks : sequences
            What was asked for and the leading part of it that came.
        nodes : mapping
            The living nodes by incarnation.
        """
        busy = {i for i, node in nodes.items() if node.readers >= BUSY_READERS}
        if not busy or not blocks:
            return None
        target = min(nodes.values(), key=lambda node: (node.readers, node.incarnation))
        wanted = []
        self._earn()
        for hit, block in zip(hits, blocks, strict=False):
            source = nodes.get(hit.node.incarnation)
            if source is None or source.incarnation not in busy or hit.copies > 1 or target.readers > IDLE_SHARE * source.readers:
                continue
            if block.header.total_bytes > self._allowance:
                break
            self._allowance -= block.header.total_bytes
            wanted.append(block)
        return (target.incarnation, wanted) if wanted else None

    def _earn(self) -> None:
        now = self._clock.now()
        self._allowance = min(self._allowance + (now - self._since) * self._bytes_per_s, float(self._bytes_per_s))
        self._since = now
