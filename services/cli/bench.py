"""``concertina bench``: run a benchmark and print one JSON object, or a table for people."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

from services.bench import BENCHES

ALL = "all"


class _BenchParser(argparse.ArgumentParser):
    """Parser of one benchmark; its module is imported, and adds its arguments, when the name was really given."""

    module: str = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.module:
            importlib.import_module(self.module).configure(self)
            self.module = ""
        return super().parse_known_args(args, namespace)


def configure(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(dest="bench", metavar="NAME", required=True, parser_class=_BenchParser)
    for name, (module, summary) in BENCHES.items():
        sub = benches.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        sub.module = module
        sub.add_argument("--quick", action="store_true", help="small sizes: does it run, and roughly how fast")
        # The command itself has --json too: said after NAME it must win, left out it must not undo the other.
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object on stdout")
    every = benches.add_parser(ALL, help="all of these, kept as files, with plots drawn from them")
    every.add_argument("--quick", action="store_true", help="small sizes")
    every.add_argument("--out", type=Path, default=Path("tests/bench"), metavar="DIR", help="where the JSON objects go (%(default)s)")
    every.add_argument("--plots", type=Path, metavar="DIR", help="where the plots go (default: none are drawn)")
    every.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends what it started
    if args.bench == ALL:
        return _run_all(args)
    bench = importlib.import_module(BENCHES[args.bench][0])
    result = bench.run(args)
    print(json.dumps(result.to_json()) if args.json else bench.render(result))
    return 0


def _run_all(args: argparse.Namespace) -> int:
    from services.bench.suite import draw, run_all

    written = run_all(args.out, args.quick, lambda line: print(f"bench: {line}", file=sys.stderr))
    drawn = draw(args.out, args.plots) if args.plots and any(written.values()) else []
    if args.json:
        print(json.dumps({"results": written, "plots": drawn}))
    else:
        print("\n".join([file for file in written.values() if file] + drawn))
    return 0 if all(written.values()) else 1
