"""A system from its first process to its last, whatever ends us in between."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

from kvstore.errors import ConfigError

from . import processes, record

#: What ends a command at a terminal.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal came that ends us; `status` is the exit status that says so."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Signals that end us raise `Interrupted`, once; those that come while we clean up are ignored."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        _ignore_signals()
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def fresh_system(name: str) -> Iterator[record.SystemRecord]:
    """A new system of this name to start processes in. When the block is left by an exception, all of it is ended and forgotten.

    Raises
    ------
    ConfigError
        Where one of this name is up already, or another command is at work on it.
    """
    with record.lock(name):
        system = _fresh(name)
        try:
            yield system
        except BaseException:
            end(system)
            raise


def end(system: record.SystemRecord) -> None:
    """End all processes of a system and forget it. Signals are ignored from here on: nothing may come between."""
    _ignore_signals()
    processes.end_system(system)
    system.remove()


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _fresh(name: str) -> record.SystemRecord:
    """A new record, once it is sure that nothing runs under the old one; what a crash left is cleared away."""
    old = record.load(name)
    if old:
        if old.phase == record.UP and any(processes.alive(p) for p in old.processes):
            where = old.inference or old.redis
            raise ConfigError(f"{name!r} is already up at {where}; `concertina down --name {name}` first, or use another --name")
        processes.end_system(old)
        old.remove()
    system = record.new_record(name)
    system.owner = processes.describe("up", os.getpid())
    system.save()
    return system
