"""``concertina top``: a running system, live."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvstore.errors import ConfigError
from services.system import record
from services.system.checks import check_count

if TYPE_CHECKING:
    from services.console.watch import Watch


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default=record.DEFAULT_NAME, help="name of the system (%(default)s)")
    parser.add_argument("--redis", metavar="URL", help="cluster to watch instead, by its metadata")
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds between samples (%(default)s)")
    parser.add_argument("--count", type=int, default=0, metavar="N", help="samples to take; 0 goes on until Ctrl-C (%(default)s)")


def run(args: argparse.Namespace) -> int:
    if not 0.1 <= args.interval <= 3600:
        raise ConfigError(f"--interval must be from 0.1 to 3600 seconds, not {args.interval:g}")
    check_count("--count", args.count, 0, 1 << 31)
    redis = args.redis or record.require(args.name).redis or ""
    from services.console.watch import Watch

    watch = Watch(redis)
    show = _json_lines if args.json else _live
    with contextlib.suppress(KeyboardInterrupt):  # the ordinary way to end it
        show(args, watch)
    return 0


def _json_lines(args: argparse.Namespace, watch: Watch) -> None:
    for _ in _rounds(args):
        print(json.dumps(watch.sample()), flush=True)


def _live(args: argparse.Namespace, watch: Watch) -> None:
    from rich.live import Live

    from services.console.table import tables

    with Live(auto_refresh=False, screen=args.count == 0) as live:
        for _ in _rounds(args):
            live.update(tables(args.redis or args.name, watch.sample()), refresh=True)


def _rounds(args: argparse.Namespace) -> Iterator[None]:
    """Once for each sample, with the pauses between them."""
    taken = 0
    while True:
        yield
        taken += 1
        if taken == args.count:
            return
        time.sleep(args.interval)
