"""``concertina demo``: the main job in one minute, on real parts, with nothing left behind."""

from __future__ import annotations

import argparse
import json
import sys
import time

from services.system import launch, record, session
from services.system.checks import bound_port, check_count, local_model
from services.system.plan import Plan

NAME = "demo"
NODES = 2
ARENA_BYTES = 32 << 20


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="", metavar="DIR|HUB-NAME", help="model to serve (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--codec", default="int8", help="codec of the first worker; the second stores raw (%(default)s)")
    parser.add_argument("--arena-mib", type=int, default=ARENA_BYTES >> 20, metavar="MIB", help="memory of each node (%(default)s)")
    parser.add_argument("--name", default=NAME, help="name of the system meanwhile (%(default)s)")


def run(args: argparse.Namespace) -> int:
    from services.system.checks import check_codec

    record.directory_of(args.name)
    check_codec(args.codec)
    check_count("--arena-mib", args.arena_mib, 8, 1 << 20)
    plan = Plan(args.name, local_model(args.model), nodes=NODES, arena_bytes=args.arena_mib << 20, codec=args.codec)
    try:
        with session.interruptible(), session.fresh_system(args.name) as system:
            kept = _play(plan, system, args.json)
            _say("taking everything down …")
            session.end(system)
    except session.Interrupted as interrupted:
        print("concertina demo: interrupted; nothing was left running", file=sys.stderr)
        return interrupted.status
    return 0 if kept else 1


def _say(line: str) -> None:
    print(f"demo: {line}", file=sys.stderr, flush=True)


def _play(plan: Plan, system: record.SystemRecord, as_json: bool) -> bool:
    """Bring the system up, play the scenes and tell of them; whether all promises were kept."""
    from rich.console import Console

    from services.demo.client import Client
    from services.demo.store import Store
    from services.demo.story import Story
    from services.demo.tell import as_json as rows_as_json
    from services.demo.tell import tell

    began = time.monotonic()
    _say(f"bringing up Redis, {plan.nodes} store nodes of {plan.arena_bytes >> 20} MiB and a worker …")
    launch.launch(plan, system, _say)
    other = Plan(plan.name, plan.model, nodes=plan.nodes, codec="raw")
    address = f"127.0.0.1:{bound_port('127.0.0.1', 0)}"
    child = launch.start_worker(other, system, "worker-2", address)
    _say("and a second worker process, on the same nodes …")
    launch.wait([child], _say)
    clients = [Client(system.inference or ""), Client(address)]
    console = Console(width=None if sys.stdout.isatty() else 150)
    story = Story(*clients, Store(system.redis or ""), _say)
    for row in story.run():
        _say(f"  {'kept' if row.good else 'NOT KEPT'}: {row.scene}: {row.outcome}")
    for client in clients:
        client.close()
    if as_json:
        print(json.dumps({"seconds": time.monotonic() - began, "scenes": rows_as_json(story.rows)}))
    else:
        tell(console, story.rows, time.monotonic() - began)
    return all(row.good for row in story.rows)
