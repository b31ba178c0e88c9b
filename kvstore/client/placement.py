"""Which node gets new blocks: one where the least value has to leave for them, by the nodes' own reports.

The choice is `kvstore.eviction.cluster.Placer`'s, the object that the replay proves; here it is fed with the membership. New blocks of
one request stay together. A node that has just joined has room, costs nothing, and so takes what is new until its bytes are worth as
much as anyone's; blocks of a node that left are placed anew when they have been computed again. Nothing is moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvstore.eviction.cluster import Placer, Pressure
from kvstore.metadata import NodeRecord


class Placement:
    """Chooses by each node's last report, less what was sent there since. Deterministic; no I/O.

    Parameters
    ----------
    host : str
        Identity of the writer's machine; where just one node of several is on it, that one is preferred at an equal price.
    """

    def __init__(self, host: str = "") -> None:
        self._host = host
        self._placer = Placer()
        self._reports: dict[str, tuple[NodeRecord, Pressure]] = {}

    def update(self, nodes: Iterable[NodeRecord]) -> None:
        """Take the nodes as they are known now; a new record of a node forgets what was sent to it before."""
        before, self._reports = self._reports, {}
        near = []
        for record in nodes:
            known = before.get(record.incarnation)
            self._reports[record.incarnation] = known if known is not None and known[0] == record else (record, _report(record))
            if record.host and record.host == self._host:
                near.append(record.incarnation)
        self._placer.home = near[0] if len(near) == 1 and len(self._reports) > 1 else None
        self._placer.update({incarnation: report for incarnation, (_, report) in self._reports.items()})

    def choose(
        self, keys: Sequence[bytes], size_bytes: int, parent: str | None = None, before: bytes | None = None, coming_bytes: int = 0
    ) -> str:
        """The incarnation that a run of blocks, together `size_bytes`, should go to. At least one node must be known.

        Parameters
        ----------
        parent : str or None
            Incarnation of the node that has the parent of the first block; None when the index does not know.
        before : bytes, optional
            Key of that parent: where it was sent a moment ago, the index may not know yet.
        coming_bytes : int
            What is going to `follow` of the same run.
        """
        if parent is None and before is not None:
            parent = self._placer.last_place(before)
        chosen = self._placer.choose(keys, size_bytes, parent, coming_bytes)
        if chosen is None:
            raise LookupError("no node is known to place blocks on")
        return chosen

    def follow(self, keys: Sequence[bytes], size_bytes: int, node: str) -> None:
        """More of a run goes to the incarnation that was chosen for its beginning, which must still be known."""
        self._placer.follow(keys, size_bytes, node)


def _report(record: NodeRecord) -> Pressure:
    return Pressure.from_text(record.pressure, max(record.arena_bytes - record.used_bytes, 0), record.arena_bytes)
