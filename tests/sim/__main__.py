"""``python -m tests.sim``: many seeds, one summary line. `make sim N=5000 SEED=1` calls it."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .seeds import remember
from .world import Result, simulate, warm_up


def main() -> int:
    """Run seeds SEED … SEED + N - 1. Exit status 1 if any has a violation; those seeds are added to the file of seeds."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=main.__doc__)
    parser.add_argument("--n", type=int, default=1000, help="number of seeds (default 1000)")
    parser.add_argument("--seed", type=int, default=1, help="the first of them (default 1)")
    parser.add_argument("--jobs", type=int, default=0, help="processes (default: one a core)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of a line")
    args = parser.parse_args()
    began, counts, failed = time.monotonic(), Counter(), {}
    virtual_s = 0.0
    for result in _progress(_results(range(args.seed, args.seed + args.n), args.jobs or os.cpu_count() or 1), args.n):
        counts += result.counts
        virtual_s += result.seconds
        if result.violations:
            failed[result.seed] = result.violations
            print(f"seed {result.seed}: " + "; ".join(result.violations[:3]), file=sys.stderr)
    remember(sorted(failed))
    seconds = time.monotonic() - began
    summary = {
        "seeds": args.n, "first_seed": args.seed, "violations": sum(map(len, failed.values())), "failed_seeds": sorted(failed),
        "seconds": round(seconds, 1), "seeds_per_second": round(args.n / seconds, 1), "virtual_hours": round(virtual_s / 3600, 2),
        "events": counts.total(), "faults": counts["fault"], "fetches": counts["fetch"], "blocks_served": counts["blocks served"],
    }  # fmt: skip
    print(json.dumps(summary) if args.json else "  ".join(f"{name}={value}" for name, value in summary.items()))
    return int(bool(failed))


def _results(seeds: range, jobs: int) -> Iterator[Result]:
    if jobs == 1:
        warm_up()
        yield from map(simulate, seeds)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=warm_up) as pool:
        yield from pool.map(simulate, seeds, chunksize=8)


def _progress(results: Iterator[Result], total: int) -> Iterator[Result]:
    columns = TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield from bar.track(results, total=total)


if __name__ == "__main__":
    sys.exit(main())
