"""``concertina replay``: run a request trace through an eviction policy, or compare all of them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from kvstore.errors import ConfigError
from kvstore.eviction import DEFAULT, create, names
from kvstore.eviction.replay import Ladder, Outcome, capacity_of, replay
from kvstore.eviction.trace import Trace, read_trace
from services.progress import Progress


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="TRACE", help="requests as JSON lines, plain or .gz")
    parser.add_argument("--policy", default=DEFAULT, choices=names(), help="eviction policy (default: %(default)s)")
    parser.add_argument("--capacity", default="5%", help="share of the distinct blocks, or a number of blocks (default: %(default)s)")
    parser.add_argument("--ladder", default="1", metavar="1,0.5,0.25", help="sizes of a block at each rung of fidelity")
    parser.add_argument("--quality", metavar="1,0.98,0.9", help="share of quality that each rung keeps")
    parser.add_argument("--nodes", type=int, help="simulate a cluster of this many nodes, which share the capacity")
    parser.add_argument("--skew", metavar="55,25,15,5", help="share of the sessions that enter at each node (default: equal)")
    parser.add_argument(
        "--stale", type=int, default=20, metavar="N", help="requests between pressure reports, or 1 s of the trace (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="read only the first N requests")
    parser.add_argument("--compare", action="store_true", help="all policies at 1, 2, 5, 10, 20 and 50 %%")
    parser.add_argument("--plot", metavar="FILE.svg", help="with --compare: draw hit rate against capacity")


def run(args: argparse.Namespace) -> int:
    trace = read_trace(args.trace, args.limit)
    ladder = Ladder.parse(args.ladder, args.quality)
    if args.compare:
        from services.replay.compare import compare, plot, table

        outcomes = compare(trace, ladder)
        if args.plot:
            Path(args.plot).write_text(plot(trace, outcomes))
        _print(args.json, {"trace": trace.name, "results": [o.as_json() for o in outcomes]}, table(outcomes))
        return 0
    outcome = _replay(args, trace, ladder)
    _print(args.json, outcome.as_json(), _summary(outcome))
    return 0


def parse_capacity(text: str, trace: Trace) -> int:
    """Blocks of ``5%``, ``0.05`` or ``2000``.

    Raises
    ------
    ConfigError
        For anything else, and for no room at all.
    """
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
        elif "." in text:
            share = float(text)
        else:
            share = int(text) / trace.distinct_blocks
            if share > 0:
                return int(text)
    except ValueError as error:
        raise ConfigError(f"--capacity is written 5% or as a number of blocks, not {text!r}") from error
    if not 0 < share < float("inf"):
        raise ConfigError(f"--capacity must be more than nothing, not {text!r}")
    return capacity_of(trace, share)


def _replay(args: argparse.Namespace, trace: Trace, ladder: Ladder) -> Outcome:
    capacity = parse_capacity(args.capacity, trace)
    with Progress(f"{args.policy} on {trace.name}") as progress:
        if args.nodes is None:
            return replay(trace, create(args.policy), capacity, ladder, progress)
        from kvstore.eviction.cluster_replay import Skew, replay_cluster

        skew = Skew.parse(args.skew, args.nodes)
        return replay_cluster(trace, args.policy, capacity, args.nodes, ladder, skew=skew, stale=args.stale, progress=progress)


def _summary(outcome: Outcome) -> str:
    lines = [
        f"{outcome.trace}: {outcome.requests} requests, {outcome.tokens} prompt tokens",
        f"{outcome.policy} in {outcome.capacity_blocks} blocks: {outcome.token_hit_rate:.2%} of tokens hit, "
        f"{outcome.quality_weighted_hit_rate:.2%} weighted by quality ({outcome.seconds:.1f} s)",
    ]
    lines += ["  " + ", ".join(f"{key} {_number(value)}" for key, value in node.items()) for node in outcome.nodes or []]
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _print(as_json: bool, data: dict[str, Any], text: str) -> None:
    sys.stdout.write((json.dumps(data) if as_json else text) + "\n")
