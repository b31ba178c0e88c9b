"""``concertina status``: endpoints, nodes and memory of a running system."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from kvstore.errors import DeadlineError, TransportError
from kvstore.settings import format_size
from services.system import record
from services.system.members import NODE_FIELDS, WORKER_FIELDS, members, rows


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default=record.DEFAULT_NAME, help="name of the system (%(default)s)")


def run(args: argparse.Namespace) -> int:
    found = status(args.name)
    print(json.dumps(found, indent=1) if args.json else _text(found))
    return 0


def status(name: str) -> dict[str, Any]:
    """The system `name` as one object; null where it lacks something.

    Raises
    ------
    NotFoundError
        Where no such system is running.
    """
    system = record.require(name)
    nodes, workers = [], []
    try:
        nodes, workers = members(system.redis or "")
    except (TransportError, DeadlineError) as error:
        print(f"concertina status: Redis at {system.redis} does not answer ({error}); who is up is not known", file=sys.stderr)
    return {
        "name": system.name,
        "inference": system.inference,
        "http": next((w.http for w in workers if w.http), None),
        "model": system.model,
        "codec": next((w.codec for w in workers if w.address == system.inference), system.codec),
        "nodes": rows(nodes, NODE_FIELDS),
        "workers": rows(workers, WORKER_FIELDS),
        "redis": system.redis,
        "prometheus": None,
        "console": record.console_of(system),
    }


def _text(found: dict[str, Any]) -> str:
    lines = [f"{found['name']}: {found['model'] or 'store alone'}, codec {found['codec']}"]
    lines += [f"  {kind:10} {found[kind]}" for kind in ("inference", "http", "redis", "console") if found[kind]]
    for node in found["nodes"]:
        used, arena = format_size(node["used_bytes"]), format_size(node["arena_bytes"])
        lines.append(f"  node       {node['id']} at {node['address']}: {used} of {arena} on {node['device']}, {node['blocks']} blocks")
    for worker in found["workers"]:
        lines.append(f"  worker     {worker['id']}: {worker['engine']} on {worker['device']}, pid {worker['pid']}")
    return "\n".join(lines)
