"""What the index of blocks costs Redis: bytes a block, and how fast blocks are announced and found again."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time

import redis

from kvstore.clock import ManualClock
from kvstore.metadata import IndexEntry, Metadata, connect
from kvstore.metadata.embedded import start_valkey

from .base import Result, log

BLOCKS, QUICK_BLOCKS = 1_000_000, 50_000
BATCH = 10_000
LOOKUP = 2000
SEED = 1


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the benchmark."""
    parser.add_argument("--blocks", type=int, metavar="N", help="blocks in the index (1000000; 50000 with --quick)")
    parser.add_argument("--holders", type=int, default=1, metavar="N", help="nodes that hold each block, 1 to 4 (%(default)s)")


def run(args: argparse.Namespace) -> Result:
    """Fill the index of a Valkey of our own and ask it for its memory."""
    blocks = args.blocks or (QUICK_BLOCKS if args.quick else BLOCKS)
    with tempfile.TemporaryDirectory() as place:
        server = start_valkey(place)
        try:
            with redis.Redis(port=server.port) as direct:
                return asyncio.run(_measure(server.url, direct, blocks, args.holders))
        finally:
            server.stop()


async def _measure(url: str, direct: redis.Redis, blocks: int, holders: int) -> Result:
    result = Result("index", {"blocks": blocks, "holders": holders, "batch_blocks": BATCH, "lookup_blocks": LOOKUP}, SEED, warm_up=0)
    metadata = connect(url, timeout_s=10)
    try:
        rng = ManualClock(SEED).rng
        await metadata.locate([bytes(32)])
        before = direct.info("memory")["used_memory"]
        announce_s, last = [], []
        for first in range(0, blocks, BATCH):
            last = [rng.randbytes(32) for _ in range(min(BATCH, blocks - first))]
            for holder in range(holders):
                began = time.perf_counter()
                await metadata.announce(f"{holder + 1:016x}", [IndexEntry(key, 100_000, 3) for key in last])
                announce_s.append(time.perf_counter() - began)
            if first * 10 // blocks != (first + BATCH) * 10 // blocks:
                log(f"{first + len(last):,} blocks announced")
        used = direct.info("memory")["used_memory"] - before
        locate_s = await _locate(metadata, last[:LOOKUP])
    finally:
        await metadata.close()
    result.samples = {"announce_batch_s": announce_s, "locate_s": locate_s}
    result.rows = [
        {
            "blocks": blocks,
            "holders": holders,
            "redis_bytes": used,
            "redis_bytes_per_block": used / blocks,
            "announced_blocks_per_s": blocks * holders / sum(announce_s),
            "locate_p50_ms": 1e3 * sorted(locate_s)[len(locate_s) // 2],
        }
    ]
    return result


async def _locate(metadata: Metadata, keys: list[bytes]) -> list[float]:
    seconds = []
    for _ in range(50):
        began = time.perf_counter()
        await metadata.locate(keys)
        seconds.append(time.perf_counter() - began)
    return seconds


def render(result: Result) -> str:
    """One line."""
    (row,) = result.rows
    return (
        f"{row['blocks']:,} blocks with {row['holders']} holder(s) each cost Redis {row['redis_bytes_per_block']:.0f} bytes a block; "
        f"{row['announced_blocks_per_s']:,.0f} were announced a second, {LOOKUP:,} located in {row['locate_p50_ms']:.1f} ms (p50)"
    )
