"""``bench store``: the store's data plane beside what bounds it and what it competes with, and how long a lookup takes.

A client moves 64 values in one call: by gRPC, through the node's door over TCP, and through shared memory; beside it, in turns, a plain
TCP copy in Python, a memory copy, and Redis (an embedded Valkey) of the same bytes. Node, servers and clients are processes of their own.
Then: lookups in a large index, a prompt's cache fetched and decoded, and how soon its lowest layers are there.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvstore.errors import ConfigError
from kvstore.metadata.embedded import start_valkey
from kvstore.settings import format_size, parse_size

from .base import Result, log, relative_speed
from .stores import layers, lookup
from .stores.party import Party, party

STORES = ("memory", "plain_tcp", "redis", "grpc", "tcp", "same_host")
#: One more where the arena is on a GPU.
GPU_YARDSTICK = "pinned"
#: Against these all others are put into proportion.
YARDSTICKS = ("memory", "plain_tcp", "redis", GPU_YARDSTICK)
SIZES, QUICK_SIZES = ("64KiB", "1MiB", "4MiB", "16MiB"), ("64KiB", "1MiB", "4MiB")
CLIENTS, QUICK_CLIENTS = (1, 2, 4, 8), (1, 2)
#: Several clients move values of this size only: 8 clients of 64 such values fill 512 MiB on each side.
SHARED_SIZE = 1 << 20
LENGTHS = (10, 16, 100, 2000)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help="of a value (64KiB 1MiB 4MiB 16MiB; no 16MiB with --quick)")
    parser.add_argument("--values", type=int, metavar="N", help="values a call (64; 16 with --quick)")
    parser.add_argument("--clients", nargs="+", type=int, metavar="N", help="clients at once, beyond 1 with values of 1 MiB (1 2 4 8)")
    parser.add_argument("--rounds", type=int, help="counted rounds (5; 3 with --quick)")
    parser.add_argument("--index", type=int, metavar="BLOCKS", help="blocks in the index (1000000; 50000 with --quick)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the node's arena is (%(default)s)")
    parser.add_argument("--only", choices=("values", "lookup", "delivered", "layers"), help="one part alone")
    parser.add_argument("--model", metavar="DIR", help="whose cache is delivered: directory or hub name (default: the default model)")
    parser.add_argument(
        "--profile", metavar="FILE", help="profile of that model (default: what this machine has; without one, no transform)"
    )


def run(args: argparse.Namespace) -> Result:
    configuration = _configuration(args)
    result = Result("store", configuration, 0, 1)
    with tempfile.TemporaryDirectory(prefix="concertina-bench-") as folder:
        server = start_valkey(Path(folder))
        try:
            if args.only in (None, "values"):
                _values(result, server.url)
            if args.only in (None, "lookup"):
                _lookup(result, server.url)
            if args.only in (None, "delivered"):
                from .stores.delivered import measure

                measure(result, server.url, args.model, args.profile)
            if args.only in (None, "layers"):
                layers.measure(result, server.url, args.quick)
        finally:
            server.stop()
    return result


def _configuration(args: argparse.Namespace) -> dict[str, Any]:
    quick = args.quick
    chosen = {
        "value_bytes": [parse_size(size) for size in args.sizes or (QUICK_SIZES if quick else SIZES)],
        "values": args.values or (16 if quick else 64),
        "clients": args.clients or list(QUICK_CLIENTS if quick else CLIENTS),
        "rounds": args.rounds or (3 if quick else 5),
        "index_blocks": args.index or (50_000 if quick else 1_000_000),
        "lookup_calls": 50 if quick else 300,
        "delivered_tokens": 512 if quick else 2048,
        "device": args.device,
    }
    if min(chosen["values"], chosen["rounds"], *chosen["clients"], *chosen["value_bytes"]) < 1:
        raise ConfigError("--sizes, --values, --clients and --rounds must be above 0")
    if chosen["index_blocks"] < max(LENGTHS):
        raise ConfigError(f"--index must hold at least the {max(LENGTHS)} blocks of one prompt")
    return chosen


def _values(result: Result, redis_url: str) -> None:
    """Every store in turns, round after round: first for one client by size, then for more clients."""
    where = result.configuration
    stores = STORES if where["device"] == "cpu" else (*STORES, GPU_YARDSTICK)
    cases = [(1, size) for size in where["value_bytes"] if 1 in where["clients"]]
    cases += [(clients, SHARED_SIZE) for clients in where["clients"] if clients > 1]
    for clients, size in cases:
        log(f"{clients} client(s), {where['values']} values of {format_size(size)} each")
        there = {"redis": redis_url, "device": where["device"]}
        with party(stores, there, clients=clients, count=where["values"], size_bytes=size) as guests:
            take_turns(result, guests, stores, clients, size)


def take_turns(result: Result, guests: Party, stores: Sequence[str], clients: int, size: int) -> None:
    """Let every store put and get, round after round, and add the samples, rows and ratios to `result`."""
    samples: dict[str, list[float]] = {f"{store}.{way}": [] for way in ("put", "get") for store in stores}
    for number in range(-result.warm_up, result.configuration["rounds"]):
        for name, seconds in samples.items():
            store, _, way = name.partition(".")
            took = guests.move(way, store)
            if number >= 0:
                seconds.append(took)
    _account(result, samples, clients, size, guests.total_bytes)


def _account(result: Result, samples: dict[str, list[float]], clients: int, size: int, total_bytes: int) -> None:
    case = f"{clients}x{size}"
    for name, seconds in samples.items():
        store, _, way = name.partition(".")
        result.samples[f"{case}.{name}_s"] = seconds
        yards = [yard for yard in YARDSTICKS if yard != store and f"{yard}.{way}" in samples]
        against = {yard: relative_speed(samples, name, f"{yard}.{way}") for yard in yards}
        rate = total_bytes / statistics.median(seconds) / 1e9
        row = {"store": store, "operation": way, "clients": clients, "value_bytes": size, "gb_per_s": rate}
        result.rows.append(row | {f"to_{yard}": ratio for yard, ratio in against.items()})
        if store not in YARDSTICKS:
            result.ratios |= {f"{case}.{name}_to_{yard}": ratio for yard, ratio in against.items()}


def _lookup(result: Result, redis_url: str) -> None:
    where = result.configuration
    log(f"lookups in an index of {where['index_blocks']:,} blocks")
    samples = lookup.measure(redis_url, where["index_blocks"], LENGTHS, where["lookup_calls"])
    ping_s = statistics.median(samples["redis_ping_s"])
    result.samples |= samples
    for length in LENGTHS:
        seconds = sorted(samples[f"lookup_{length}_s"])
        row = {"lookup_blocks": length, "index_blocks": where["index_blocks"], "redis_ping_p50_ms": 1e3 * ping_s}
        result.rows.append(row | {f"p{p}_ms": 1e3 * seconds[min(len(seconds) - 1, len(seconds) * p // 100)] for p in (50, 99)})


def render(result: Result) -> str:
    """The tables for people."""
    lines = []
    moved = [row for row in result.rows if "store" in row]
    stores = list(dict.fromkeys(row["store"] for row in moved))
    if moved:
        lines.append("clients  value    " + "".join(f"{name:>22}" for name in stores) + "   GB/s put / get")
    for case in dict.fromkeys((row["clients"], row["value_bytes"]) for row in moved):
        rates = {(r["store"], r["operation"]): r for r in moved if (r["clients"], r["value_bytes"]) == case}
        cells = [f"{rates[name, 'put']['gb_per_s']:.2f} / {rates[name, 'get']['gb_per_s']:.2f}" for name in stores]
        lines.append(f"{case[0]:>7}  {format_size(case[1]):<9}" + "".join(f"{cell:>22}" for cell in cells))
        for yard in [yard for yard in YARDSTICKS if (yard, "put") in rates]:
            ratios = [(rates[name, "put"].get(f"to_{yard}"), rates[name, "get"].get(f"to_{yard}")) for name in stores]
            texts = ["" if None in pair else f"{pair[0]:.2f} / {pair[1]:.2f}" for pair in ratios]
            lines.append(f"         ÷ {yard:<10}"[:18] + "".join(f"{text:>22}" for text in texts))
    for row in result.rows:
        if "lookup_blocks" in row:
            times = f"p50 {row['p50_ms']:.2f} ms, p99 {row['p99_ms']:.2f} ms"
            lines.append(
                f"lookup of {row['lookup_blocks']:>5} among {row['index_blocks']:,}: {times} (Redis ping {row['redis_ping_p50_ms']:.2f} ms)"
            )
        if "delivered" in row:
            ratios = ", ".join(f"{name} {value:.2f}" for name, value in row.items() if "_to_" in name)
            what = f"delivered {row['delivered']}, ratio {row['ratio']:.1f}, {row['path']}"
            lines.append(f"{what}: {row['raw_gb_per_s']:.2f} GB/s of raw K and V; {ratios}")
        if "layers" in row:
            what = f"the lowest quarter of the layers of {row['blocks']} blocks of {format_size(row['block_bytes'])}, {row['layers']}"
            lines.append(f"{what}: {row['lowest_to_whole']:.2f} of the time of whole blocks, all layers {row['by_layers_to_whole']:.2f}")
    return "\n".join(lines)
