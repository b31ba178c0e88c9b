"""``concertina up``: a whole system on this machine."""

from __future__ import annotations

import argparse
import json
import sys
import time

from kvstore.errors import TransportError
from kvstore.settings import format_size
from services.system import launch, plan, processes, record, session


def configure(parser: argparse.ArgumentParser) -> None:
    plan.configure(parser)
    parser.add_argument("--name", default=record.DEFAULT_NAME, help="name of the system (%(default)s)")
    parser.add_argument("--foreground", action="store_true", help="stay, and take the system down at SIGTERM or Ctrl-C")


def run(args: argparse.Namespace) -> int:
    record.directory_of(args.name)
    wanted = plan.plan(args)
    try:
        with session.interruptible(), session.fresh_system(args.name) as system:
            launch.launch(wanted, system, _say)
            if system.codec != wanted.codec:
                _say(f"a profile for {wanted.codec} is found or made in the background; new blocks are {system.codec} until then")
            _tell(wanted, system, args)
            if args.foreground:
                _stay(system)
    except session.Interrupted as interrupted:
        print("concertina up: interrupted; nothing was left running", file=sys.stderr)
        return interrupted.status
    return 0


def _say(line: str) -> None:
    print(f"up: {line}", file=sys.stderr, flush=True)


def _tell(wanted: plan.Plan, system: record.SystemRecord, args: argparse.Namespace) -> None:
    """How to call it; on stdout."""
    if args.json:
        answer = {"name": system.name, "inference": system.inference, "http": system.http, "redis": system.redis}
        print(json.dumps(answer), flush=True)
        return
    name = "" if system.name == record.DEFAULT_NAME else f" --name {system.name}"
    lines = [f"Concertina is up: {wanted.nodes} store node(s) of {format_size(wanted.arena_bytes)}, Redis at {system.redis}."]
    if system.inference:
        lines.append(f"{system.model} answers gRPC (concertina.inference.v1.InferenceService) at {system.inference}:")
        lines.append(f'  concertina generate{name} "Once upon a time"')
    if system.http:
        lines.append(f"and OpenAI's clients at {system.http}/v1")
    lines.append(f"  concertina status{name}    |    concertina down{name}")
    print("\n".join(lines), flush=True)


def _stay(system: record.SystemRecord) -> None:
    """Until a signal comes, or a part of the system ends. Raises TransportError for the latter."""
    while True:
        for part in system.processes:
            if not processes.alive(part):
                raise TransportError(f"{part.part} has ended; see {system.logs} while it lasts. Taking the rest down")
        time.sleep(0.5)
