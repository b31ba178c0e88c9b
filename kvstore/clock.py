"""The only reader of time and randomness, so that a whole cluster can run under simulation from one seed."""

from __future__ import annotations

import random
import time
from typing import Protocol


class Clock(Protocol):
    """Time in seconds and seeded randomness. Injected, never imported."""

    rng: random.Random

    def now(self) -> float:
        """Monotonic seconds; only differences mean anything."""

    def wall(self) -> float:
        """Seconds since the epoch; may jump."""


class SystemClock:
    """The machine's clock and its entropy."""

    def __init__(self) -> None:
        self.rng: random.Random = random.SystemRandom()

    def now(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


class ManualClock:
    """A clock that stands still until it is told to move; for tests and simulation.

    Parameters
    ----------
    seed : int
        Seed of `rng`; the same seed gives the same draws.
    """

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def wall(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds`."""
        self._now += seconds
