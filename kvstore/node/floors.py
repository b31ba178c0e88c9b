"""How coarse the ladder may make the blocks of a tenant.

The floors are in the metadata (`kvstore.metadata.subjects.FLOORS`), as relative errors like a request's `max_distortion`. A block is
told to the policy without the rungs below its tenant's floor, so that the policy weighs a drop where the ladder ends. A floor may be
newer than the block: the engine asks again before it demotes.
"""

from __future__ import annotations

from kvstore.block import BlockHeader


class FloorTable:
    """The floors as they were last heard."""

    def __init__(self) -> None:
        self.limits: dict[str, float] = {}

    def hear(self, limits: dict[str, float]) -> None:
        """Take the floors as they are now."""
        self.limits = limits

    def fidelity(self, header: BlockHeader, owner: str) -> int:
        """The least number of layers of the block that its owner and namespace allow, at most those that it has."""
        if not self.limits:
            return 1
        limit = min((self.limits[subject] for subject in (owner, header.namespace.hex()) if subject in self.limits), default=None)
        if limit is None:
            return 1
        rows = header.rows[: header.present]
        fine = (number for number, row in enumerate(rows, 1) if max(row.distortion.keys, row.distortion.values) <= limit)
        return next(fine, header.present)
