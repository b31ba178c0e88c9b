"""``python -m tests.fault``: every fault again and again on real processes; a table, or one JSON object. `make fault` calls it."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from .base import Outcome
from .faults import FAULTS
from .run import repeat
from .system import System

COLUMNS = ("reps", "served", "missed", "wrong", "hangs", "lost_pins", "unhealthy")


def main() -> int:
    """Exit status 1 if anything that must stay 0 did not."""
    parser = argparse.ArgumentParser(prog="python -m tests.fault", description=main.__doc__)
    parser.add_argument("--reps", type=int, default=20, help="repetitions of each fault (default 20)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only faults whose name contains this")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="only the I-th of N parts of the table, counted from 0")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    logging.getLogger("kvstore").setLevel(logging.CRITICAL)
    part, parts = map(int, args.part.split("/"))
    names = [name for name in list(FAULTS)[part::parts] if args.only in name]
    with tempfile.TemporaryDirectory(prefix="concertina-faults-") as directory:
        outcomes = asyncio.run(_run(Path(directory), names, args.reps))
    bad = sum(outcome.bad for outcome in outcomes.values())
    if args.json:
        total = {name: sum(getattr(outcome, name) for outcome in outcomes.values()) for name in (*COLUMNS, "seconds")}
        print(json.dumps({"faults": {name: asdict(outcome) for name, outcome in outcomes.items()}, "kinds": len(outcomes), **total}))
    else:
        Console(width=120).print(_table(outcomes))
    return int(bad > 0)


async def _run(directory: Path, names: Iterable[str], repetitions: int) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    system: System | None = None
    try:
        for name in sorted(names, key=lambda name: FAULTS[name].spill):
            fault = FAULTS[name]
            if system is None or system.spill != fault.spill:
                if system is not None:
                    await system.stop()
                system = System(directory, fault.spill)
                await system.start()
            if why_not := fault.available(system):
                print(f"{name}: not here, {why_not}", file=sys.stderr)
                continue
            outcome = outcomes[name] = await repeat(system, fault, repetitions)
            print(f"{name}: {asdict(outcome)}", file=sys.stderr)
            if outcome.unhealthy:  # the others deserve a well system
                await system.stop()
                system = None
    finally:
        if system is not None:
            await system.stop()
    return outcomes


def _table(outcomes: dict[str, Outcome]) -> Table:
    table = Table(Column("fault", no_wrap=True), *COLUMNS, "s each", title="Faults on real processes")
    for name, outcome in outcomes.items():
        each = outcome.seconds / max(1, outcome.reps)
        table.add_row(name, *(str(getattr(outcome, column)) for column in COLUMNS), f"{each:.2f}", style="red" if outcome.bad else "")
    total = [str(sum(getattr(outcome, column) for outcome in outcomes.values())) for column in COLUMNS]
    table.add_row(f"{len(outcomes)} kinds", *total, "", style="bold")
    return table


if __name__ == "__main__":
    sys.exit(main())
