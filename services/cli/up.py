"""``concertina up``: a whole system on this machine."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

from kvstore.errors import ConfigError, TransportError
from kvstore.settings import format_size
from services.cli.system import launch, plan, processes, record

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def configure(parser: argparse.ArgumentParser) -> None:
    plan.configure(parser)
    parser.add_argument("--name", default=record.DEFAULT_NAME, help="name of the system (%(default)s)")
    parser.add_argument("--foreground", action="store_true", help="stay, and take the system down at SIGTERM or Ctrl-C")


def run(args: argparse.Namespace) -> int:
    record.directory_of(args.name)
    wanted = plan.plan(args)
    try:
        with _interruptible(), record.lock(args.name):
            system = _fresh(args.name)
            with _down_on_failure(system):
                launch.launch(wanted, system, _say)
                _tell(wanted, system, args)
                if args.foreground:
                    _stay(system)
    except _Interrupted as signal_:
        print("concertina up: interrupted; nothing was left running", file=sys.stderr)
        return 128 + signal_.number
    return 0


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class _Interrupted(BaseException):
    """A signal came that ends us."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Signals that end us raise `_Interrupted`, once; those that come while we clean up are ignored."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        _ignore_signals()
        raise _Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _down_on_failure(system: record.SystemRecord) -> Iterator[None]:
    try:
        yield
    except BaseException:
        _ignore_signals()
        processes.end_system(system)
        system.remove()
        raise


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


def _say(line: str) -> None:
    print(f"up: {line}", file=sys.stderr, flush=True)


def _tell(wanted: plan.Plan, system: record.SystemRecord, args: argparse.Namespace) -> None:
    """How to call it; on stdout."""
    if args.json:
        print(json.dumps({"name": system.name, "inference": system.inference, "redis": system.redis}), flush=True)
        return
    name = "" if system.name == record.DEFAULT_NAME else f" --name {system.name}"
    lines = [f"Concertina is up: {wanted.nodes} store node(s) of {format_size(wanted.arena_bytes)}, Redis at {system.redis}."]
    if system.inference:
        lines.append(f"{system.model} answers gRPC (concertina.inference.v1.InferenceService) at {system.inference}:")
        lines.append(f'  concertina generate{name} "Once upon a time"')
    lines.append(f"  concertina status{name}    |    concertina down{name}")
    print("\n".join(lines), flush=True)


def _stay(system: record.SystemRecord) -> None:
    """Until a signal comes, or a part of the system ends. Raises TransportError for the latter."""
    while True:
        for part in system.processes:
            if not processes.alive(part):
                raise TransportError(f"{part.part} has ended; see {system.logs} while it lasts. Taking the rest down")
        time.sleep(0.5)
