"""``concertina bench``: run a benchmark and print one JSON object, or a table for people."""

from __future__ import annotations

import argparse
import importlib
import json
from typing import Any

from services.bench import BENCHES


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


def run(args: argparse.Namespace) -> int:
    bench = importlib.import_module(BENCHES[args.bench][0])
    result = bench.run(args)
    print(json.dumps(result.to_json()) if args.json else bench.render(result))
    return 0
