"""``python -m tests.fault.jumping_node node …``: `concertina node` with clocks that jump at SIGUSR1 (an hour on) and SIGUSR2 (back)."""

from __future__ import annotations

import signal
import sys
from unittest.mock import patch

from kvstore.clock import SystemClock
from services.cli import main


class JumpingClock(SystemClock):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead_s = self.wrong_s = 0.0
        signal.signal(signal.SIGUSR1, lambda *_: self._jump(3600.0, 0.0))
        signal.signal(signal.SIGUSR2, lambda *_: self._jump(0.0, -1e6))

    def _jump(self, ahead_s: float, wrong_s: float) -> None:
        self.ahead_s += ahead_s
        self.wrong_s += wrong_s

    def now(self) -> float:
        return super().now() + self.ahead_s

    def wall(self) -> float:
        return super().wall() + self.wrong_s


if __name__ == "__main__":
    with patch("kvstore.node.node.SystemClock", JumpingClock):
        sys.exit(main(sys.argv[1:]))
