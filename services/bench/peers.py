"""``bench peers``: this store beside those of LMCache and Mooncake, where their wheels are installed, and Redis.

All run in turns in one run, each with a server and a client process of its own, values of the same bytes. What is not installed is named.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path

from kvstore.metadata.embedded import start_valkey
from kvstore.settings import format_size, parse_size

from . import store
from .base import Result, log
from .stores import lmcache, mooncake
from .stores.party import party


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help="of a value (1MiB 4MiB 16MiB; 1MiB with --quick)")
    parser.add_argument("--values", type=int, metavar="N", help="values a call (16; 8 with --quick)")
    parser.add_argument("--rounds", type=int, help="counted rounds (5; 3 with --quick)")


def run(args: argparse.Namespace) -> Result:
    sizes = args.sizes or (["1MiB"] if args.quick else ["1MiB", "4MiB", "16MiB"])
    absent = {name: why for name, why in (("lmcache", lmcache.missing()), ("mooncake", mooncake.missing())) if why}
    for why in absent.values():
        log(f"left out: {why}")
    configuration = {
        "value_bytes": [parse_size(size) for size in sizes],
        "values": args.values or (8 if args.quick else 16),
        "clients": [1],
        "rounds": args.rounds or (3 if args.quick else 5),
        "left_out": absent,
    }
    result = Result("peers", configuration, 0, 1)
    names = [*store.STORES, *(name for name in ("lmcache", "mooncake") if name not in absent)]
    with ExitStack() as stack:
        valkey = start_valkey(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="concertina-bench-"))))
        stack.callback(valkey.stop)
        where = {"redis": valkey.url, "device": "cpu"}
        if "lmcache" not in absent:
            where |= stack.enter_context(lmcache.server())
        if "mooncake" not in absent:
            largest = configuration["values"] * max(configuration["value_bytes"])
            where |= stack.enter_context(mooncake.server(2 * largest + (64 << 20)))
        for size in configuration["value_bytes"]:
            log(f"{configuration['values']} values of {format_size(size)} each")
            with party(names, where, clients=1, count=configuration["values"], size_bytes=size) as guests:
                store.take_turns(result, guests, names, 1, size)
    return result


def render(result: Result) -> str:
    """The table for people."""
    lines = [store.render(result), *(f"left out: {why}" for why in result.configuration["left_out"].values())]
    return "\n".join(lines)
