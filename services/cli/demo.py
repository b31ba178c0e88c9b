"""``concertina demo``: the main job in one minute, on real parts, with nothing left behind."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING

from services.system import launch, record, session
from services.system.checks import bound_port, check_codec, check_count, local_model
from services.system.plan import Plan

if TYPE_CHECKING:
    from services.demo.story import Row

NAME = "demo"
NODES = 2
ARENA_BYTES = 24 << 20


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="", metavar="DIR|HUB-NAME", help="model to serve (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--codec", default="int8", help="codec of the first worker; the second stores raw (%(default)s)")
    parser.add_argument("--arena-mib", type=int, default=ARENA_BYTES >> 20, metavar="MIB", help="memory of each node (%(default)s)")
    parser.add_argument("--name", default=NAME, help="name of the system meanwhile (%(default)s)")


def run(args: argparse.Namespace) -> int:
    record.directory_of(args.name)
    check_codec(args.codec)
    check_count("--arena-mib", args.arena_mib, 8, 1 << 20)
    plan = Plan(args.name, local_model(args.model), nodes=NODES, arena_bytes=args.arena_mib << 20, codec=args.codec)
    began = time.monotonic()
    try:
        with session.interruptible(), session.fresh_system(args.name) as system:
            rows = _play(plan, system)
            _say("taking everything down …")
            session.end(system)
    except session.Interrupted as interrupted:
        print("concertina demo: interrupted; nothing was left running", file=sys.stderr)
        return interrupted.status
    _tell(rows, time.monotonic() - began, args.json)
    return 0 if all(row.good for row in rows) else 1


def _say(line: str) -> None:
    print(f"demo: {line}", file=sys.stderr, flush=True)


def _play(plan: Plan, system: record.SystemRecord) -> list[Row]:
    """Bring the system up and play the scenes."""
    from services.demo.client import Client
    from services.demo.store import Store
    from services.demo.story import Story

    _say(f"bringing up Redis, {plan.nodes} store nodes of {plan.arena_bytes >> 20} MiB, a worker, and a second one for later …")
    children = launch.begin(plan, system, _say)
    address = f"127.0.0.1:{bound_port('127.0.0.1', 0)}"
    children.append(launch.start_worker(dataclasses.replace(plan, codec="raw"), system, "worker-2", address))
    launch.finish(plan, system, children, _say)
    first, second = Client(system.inference or ""), Client(address)
    story = Story(first, second, Store(system.redis or ""), _say)
    for row in story.run():
        _say(f"  {'kept' if row.good else 'NOT KEPT'}: {row.scene}: {row.outcome}")
    first.close()
    second.close()
    return story.rows


def _tell(rows: list[Row], seconds: float, as_json: bool) -> None:
    from rich.console import Console

    from services.demo import tell

    if as_json:
        print(json.dumps({"seconds": seconds, "scenes": tell.as_json(rows)}))
    else:
        tell.tell(Console(width=None if sys.stdout.isatty() else 150), rows, seconds)
