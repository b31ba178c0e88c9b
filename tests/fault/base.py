"""What a fault is, and what one repetition of it may cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from .system import System


class Fault:
    """One kind of failure, made on a running system and taken back.

    Attributes
    ----------
    load : str
        What clients are doing meanwhile: ``mixed``, ``put``, ``get`` or ``pressure`` (puts far beyond what fits, so that nodes demote
        and evict).
    way : str
        How clients reach blocks: ``grpc``, or through the nodes' doors, ``tcp`` or ``local`` (shared memory).
    spill : bool
        Whether it is made on nodes that spill to disk.
    lasts_s : float
        From `inject` to `heal`.
    damages : bool
        Whether it destroys stored bytes or a node's sense of time: pinned blocks may then be gone, or be misses.
    """

    load: str = "mixed"
    way: str = "grpc"
    spill: ClassVar[bool] = False
    lasts_s: float = 0.4
    damages: ClassVar[bool] = False

    def available(self, system: System) -> str:
        """Why it cannot be made here; empty if it can."""
        return ""

    async def inject(self, system: System) -> None:
        """Make it happen."""
        raise NotImplementedError

    async def heal(self, system: System) -> None:
        """Take it back. By itself the system must then get well."""


@dataclass(slots=True)
class Outcome:
    """Repetitions of one fault. All but `reps`, `served`, `missed` and `seconds` must stay 0."""

    reps: int = 0
    served: int = 0
    missed: int = 0
    wrong: int = 0
    hangs: int = 0
    lost_pins: int = 0
    unhealthy: int = 0
    seconds: float = 0.0
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def bad(self) -> int:
        return self.wrong + self.hangs + self.lost_pins + self.unhealthy

    def blame(self, what: str, note: str) -> None:
        """Count one of what must stay 0."""
        setattr(self, what, getattr(self, what) + 1)
        self.notes[f"{what}: {note}"] += 1
