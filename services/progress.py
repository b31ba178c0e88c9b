"""A progress line on stderr, shown only to a person and only when the work is long."""

from __future__ import annotations

import sys
import time
from types import TracebackType

_WIDTH = 30


class Progress:
    """Call it with ``(done, total)``; it draws at most ten times a second, and not in the first `patience_s` seconds."""

    def __init__(self, label: str, patience_s: float = 1.0) -> None:
        self.label = label
        self._shown = False
        self._next = time.monotonic() + patience_s if sys.stderr.isatty() else float("inf")

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + 0.1
        self._shown = True
        filled = _WIDTH * done // max(total, 1)
        sys.stderr.write(f"\r{self.label} [{'#' * filled}{'.' * (_WIDTH - filled)}] {done}/{total}")
        sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
