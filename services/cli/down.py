"""``concertina down``: end what one `up` started, and nothing else."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time

from kvstore.errors import NotFoundError
from services.system import processes, record

OWNER_PATIENCE_S = 45.0


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default=record.DEFAULT_NAME, help="name of the system (%(default)s)")


def run(args: argparse.Namespace) -> int:
    system = record.load(args.name)
    if system is None:
        raise NotFoundError(f"no system {args.name!r} is running; running: {', '.join(record.names()) or 'none'}")
    _end_owner(system)
    with record.lock(args.name):
        system = record.load(args.name) or system  # its owner may have written more, or all of it may be gone by now
        count = processes.end_system(system)
        system.remove()
    left = processes.belonging(system)
    if left:
        print(f"concertina down: still running: {', '.join(str(p.pid) for p in left)}", file=sys.stderr)
        return 1
    print(json.dumps({"name": args.name, "ended": count}) if args.json else f"{args.name}: down, {count} processes ended")
    return 0


def _end_owner(system: record.SystemRecord) -> None:
    """An `up` that is still starting, or stays in the foreground, takes its system down itself."""
    owner = processes.alive(system.owner) if system.owner else None
    if owner is None:
        return
    owner.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + OWNER_PATIENCE_S
    while processes.alive(system.owner) and time.monotonic() < deadline:
        time.sleep(0.1)
