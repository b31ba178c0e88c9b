"""Which node gets a new block: its parent's, for a run of blocks; the emptiest by share where a run begins.

Nodes of any size fill alike, a long chain is read from several nodes at once, and the loss of a node cuts a chain at the end of a run
rather than at its first or second block.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvstore.metadata import NodeRecord

#: Blocks of a chain that stay together: 1,024 tokens at 64 a block.
RUN_BLOCKS = 16


class Placement:
    """Chooses by the fill that a node last reported plus what was sent there since. Deterministic; no I/O."""

    def __init__(self) -> None:
        self._nodes: dict[str, NodeRecord] = {}
        self._sent: dict[str, int] = {}

    def update(self, nodes: Iterable[NodeRecord]) -> None:
        """Take the nodes as they are known now; a new report forgets what was sent before it."""
        before, self._nodes = self._nodes, {record.incarnation: record for record in nodes}
        self._sent = {i: self._sent.get(i, 0) if before.get(i) == record else 0 for i, record in self._nodes.items()}

    def choose(self, size_bytes: int, depth: int, parent: str | None) -> str:
        """The incarnation that a block of `size_bytes` should go to. At least one node must be known.

        Parameters
        ----------
        size_bytes : int
        depth : int
            Number of ancestors in its chain.
        parent : str or None
            Incarnation of the node that has its parent; None when not known.
        """
        follows = parent in self._nodes and depth % RUN_BLOCKS
        chosen = parent if follows else min(self._nodes, key=lambda i: (self._fill(i, size_bytes), i))
        self._sent[chosen] += size_bytes
        return chosen

    def _fill(self, incarnation: str, size_bytes: int) -> float:
        """Share of the arena in use once the block is there. Above 1 the node evicts; then what was sent decides."""
        record = self._nodes[incarnation]
        return (record.used_bytes + self._sent[incarnation] + size_bytes) / max(1, record.arena_bytes)
