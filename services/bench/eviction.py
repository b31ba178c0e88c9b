"""``bench eviction``: what the replay promises, and what live nodes of small arenas do.

Three questions, each put to real node processes through the real client; only the payload is made up.

* *agreement*: a trace's first minutes, at a multiple of their pace, in live stores and in replays: mean token hit rates.
* *cliff*: a working set that grows from half of the memory to eight times of it, in shuffled rounds: hit rates of the ladder against whole
  blocks in LRU order, and of blocks as small as `transform` makes them.
* *put*: time of a Put that has to evict, against one that finds room, taking turns.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from kvstore.client.frames import put_messages
from kvstore.client.transport import GrpcTransport
from kvstore.errors import ConfigError
from kvstore.eviction.cluster_replay import replay_cluster
from kvstore.eviction.replay import Outcome, capacity_of
from kvstore.eviction.trace import BLOCK_TOKENS, Trace, read_trace
from services.plot import line_plot
from services.progress import Progress

from .base import Result, log
from .live import LiveStore, Maker, Shape, valkey

_SEED = 1
_NODES = 2
_PAGE = 512
_RAW = 16 << 10
#: What is stored of one block of 16 KiB raw; the divergences of the rungs are those measured for `transform` (nats a token).
SHAPES = {
    "raw": Shape((_RAW,), (0.0,)),
    "ladder": Shape((_RAW // 4, _RAW // 4, _RAW // 2), (0.024, 0.0054, 0.0008)),
    "transform": Shape((_RAW // 32, _RAW // 32, _RAW // 16), (0.024, 0.0054, 0.0008)),
}
#: Contestants of the cliff: policy and shape of the blocks.
CLIFF = {
    "raw, LRU, drop only": ("lru", "raw"),
    "three layers, ladder": ("value", "ladder"),
    "transform 8-16-32x, ladder": ("value", "transform"),
}
_QUALITY = {1: 0.9, 2: 0.98, 3: 1.0}
_CHAIN_BLOCKS = 8
#: The index knows of a block some 10 ms after its Put; a prompt that comes sooner misses it, which is not what is measured here.
_INDEXED_S = 0.02
#: A trace's first minutes on small arenas are chaotic: requests that are some milliseconds late make another run. So several live stores
#: are compared with several replays, in which requests are late by up to so much.
_LIVE, _REPLAYS, _LATE_S = 4, 16, 0.01


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", metavar="FILE", help="requests as JSON lines, plain or .gz (default: made-up sessions)")
    parser.add_argument("--minutes", type=float, help="of the trace to replay (6; 2 with --quick)")
    parser.add_argument("--speed", type=float, default=6.0, help="how many times faster than the trace (%(default)s)")
    parser.add_argument("--capacity", type=float, default=0.1, help="share of the distinct blocks that the nodes hold (%(default)s)")
    parser.add_argument("--plot", metavar="FILE.svg", help="draw the cliff")


def run(args: argparse.Namespace) -> Result:
    minutes = args.minutes or (2.0 if args.quick else 6.0)
    if not (minutes > 0 and args.speed > 0 and 0 < args.capacity <= 1):
        raise ConfigError("--minutes and --speed must be above 0, and --capacity above 0 and at most 1")
    trace = first_minutes(read_trace(args.trace) if args.trace else sessions(minutes), minutes, args.speed)
    configuration = {
        "trace": trace.name, "minutes": minutes, "speed": args.speed, "requests": len(trace.requests), "nodes": _NODES,
        "capacity_share": args.capacity, "capacity_blocks": capacity_of(trace, args.capacity), "page_bytes": _PAGE, "raw_block_bytes": _RAW,
    }  # fmt: skip
    result = Result("eviction", configuration, _SEED, 1)
    with tempfile.TemporaryDirectory(prefix="concertina-bench-") as directory:
        redis = valkey(directory)
        try:
            asyncio.run(_run(args, trace, redis, result))
        finally:
            redis.stop()
    if args.plot:
        Path(args.plot).write_text(plot(result))
    return result


async def _run(args: argparse.Namespace, trace: Trace, redis: Any, result: Result) -> None:
    log("the trace, live …")
    result.rows.append(await agreement(trace, capacity_of(trace, args.capacity), redis))
    log("the cliff …")
    shares = (0.5, 1.0, 2.0, 8.0) if args.quick else (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    for name, (policy, shape) in CLIFF.items():
        result.rows += await cliff(name, policy, SHAPES[shape], shares, 32 if args.quick else 128, redis)
    log("puts …")
    result.samples |= await puts(200 if args.quick else 600, redis)
    result.rows.append(_put_row(result.samples))
    result.ratios["put_p99_evicting_to_roomy"] = result.rows[-1]["p99_ratio"]
    result.ratios["live_minus_replay_points"] = result.rows[0]["difference_points"]


# ---- agreement


def first_minutes(trace: Trace, minutes: float, speed: float) -> Trace:
    """The requests of the first minutes, at `speed` times their pace, whole blocks alone: a partial one is never published."""
    begin = trace.requests[0].now
    kept = [request for request in trace.requests if request.now - begin < 60 * minutes]
    whole = [(request, request.input_tokens // BLOCK_TOKENS) for request in kept]
    rows = (((request.now - begin) / speed, count * BLOCK_TOKENS, request.blocks[:count]) for request, count in whole)
    return Trace.of(f"{trace.name}, {minutes:g} min", rows)


def late(trace: Trace, seed: int) -> Trace:
    """The same requests in the same order, each up to `_LATE_S` late."""
    rng, now, rows = random.Random(seed), 0.0, []
    for request in trace.requests:
        now = max(now, request.now + rng.uniform(0.0, _LATE_S))
        rows.append((now, request.input_tokens, request.blocks))
    return Trace.of(trace.name, rows)


def sessions(minutes: float, seed: int = _SEED) -> Trace:
    """Made-up traffic: conversations that come back with a longer prompt, some after a while, and share few system prompts."""
    rng = random.Random(seed)
    events: list[tuple[float, int, list[tuple[Any, ...]]]] = []
    start, session = 0.0, 0
    while (start := start + rng.expovariate(1.0)) < 60 * minutes:
        session += 1
        chain: list[tuple[Any, ...]] = [("system", session % 5, j) for j in range(2)]
        now = start
        for turn in range(1 + int(rng.expovariate(1 / 4))):
            chain = [*chain, *((session, turn, j) for j in range(rng.randint(1, 8)))]
            events.append((now, len(chain) * BLOCK_TOKENS, chain))
            now += rng.lognormvariate(3.4, 0.8)
    return Trace.of("sessions", sorted((event for event in events if event[0] < 60 * minutes), key=lambda event: event[0]))


async def agreement(trace: Trace, capacity_blocks: int, redis: Any) -> dict[str, Any]:
    """Token hit rates of live stores, fed side by side, and of replays, all with the default policy on `_NODES` nodes: their means."""
    maker = Maker("trace", Shape((_PAGE,), (0.0,)))
    with Progress("requests") as progress:
        fed = [_live(trace, capacity_blocks, redis, maker, number, progress) for number in range(_LIVE)]
        live = await asyncio.gather(*fed)
    replays = [replay_cluster(late(trace, seed), "value", capacity_blocks, _NODES, at_home=False) for seed in range(_REPLAYS)]
    rates = {"live": [row["hit_rate"] for row in live], "replay": [replay.token_hit_rate for replay in replays]}
    found, expected = statistics.mean(rates["live"]), statistics.mean(rates["replay"])
    return {
        "part": "agreement",
        "live_hit_rate": found,
        "replay_hit_rate": expected,
        "difference_points": 100 * (found - expected),
        **{f"{name}_hit_rates": each for name, each in rates.items()},
        **{f"{name}_deviation_points": 100 * statistics.stdev(each) for name, each in rates.items()},
        "requests": len(trace.requests),
        "late_s": max(row["late_s"] for row in live),
        **{name: sum(row[name] for row in live) for name in ("evictions", "demotions")},
    }


async def _live(trace: Trace, capacity_blocks: int, redis: Any, maker: Maker, number: int, progress: Progress) -> dict[str, Any]:
    """One store of its own, fed with the trace: its token hit rate, how late a request was at most, evictions and demotions."""
    arena = -(-capacity_blocks // _NODES) * _PAGE
    outcome = Outcome(trace.name, "value", capacity_blocks)
    name = f"agreement-{number}"
    async with LiveStore(redis, name, nodes=_NODES, arena_bytes=arena, page_bytes=_PAGE, policy="value") as store:
        late_s = await _feed(store, trace, maker, outcome, progress)
        return {"hit_rate": outcome.token_hit_rate, "late_s": late_s, **await store.totals()}


async def _feed(store: LiveStore, trace: Trace, maker: Maker, outcome: Outcome, progress: Progress) -> float:
    """Send every request when it is due; the longest that one was late, in seconds."""
    begin, late_s = time.perf_counter(), 0.0
    for number, request in enumerate(trace.requests):
        ahead = request.now - (time.perf_counter() - begin)
        late_s = max(late_s, -ahead)
        await asyncio.sleep(max(ahead, 0.0))
        chain = [maker.block(b, trace.parents[b], trace.depths[b]) for b in request.blocks]
        found = await visit(store, maker, chain, request.input_tokens)
        outcome.requests += 1
        outcome.tokens += request.input_tokens
        outcome.hit_tokens += min(BLOCK_TOKENS * len(found), request.input_tokens)
        progress(number, len(trace.requests))
    return late_s


async def visit(store: LiveStore, maker: Maker, chain: list[Any], input_tokens: int) -> list[int]:
    """What a worker does with a prompt: fetch its cached prefix, publish the rest. The fidelity of each block that was found."""
    hits = await store.client.lookup([block.header.key for block in chain], deadline_s=5.0)
    fetched = await store.client.fetch(hits, namespace=maker.namespace, deadline_s=10.0, input_tokens=input_tokens)
    if store.client.publish(chain[len(fetched.blocks) :], input_tokens=input_tokens):
        await store.client.flush(30.0)
        await asyncio.sleep(_INDEXED_S)
    return [block.header.present for block in fetched.blocks]


# ---- the cliff


async def cliff(name: str, policy: str, shape: Shape, shares: tuple[float, ...], memory_blocks: int, redis: Any) -> list[dict[str, Any]]:
    """Hit rate for each size of the working set, as a share of the memory in raw blocks; after each, the nodes are cleared."""
    rows, rng = [], random.Random(_SEED)
    arena = memory_blocks * _RAW // _NODES
    prefix = f"cliff-{policy}-{shape.size_bytes}"
    async with LiveStore(redis, prefix, nodes=_NODES, arena_bytes=arena, page_bytes=_PAGE, policy=policy) as store:
        for share in shares:
            chains = max(1, round(share * memory_blocks / _CHAIN_BLOCKS))
            maker = Maker(f"{name} {share}", shape)
            fidelities = await _rounds(store, maker, chains, rng)
            blocks = 3 * chains * _CHAIN_BLOCKS
            hit = len(fidelities) / blocks
            quality = sum(_QUALITY[fidelity] for fidelity in fidelities) / blocks if len(shape.layers) > 1 else hit
            row = {"part": "cliff", "store": name, "working_set_to_memory": share, "hit_rate": hit, "quality_weighted_hit_rate": quality}
            rows.append(row)
            await store.client.admin.clear()
            await asyncio.sleep(1.0)  # the next reports say that there is room
    return rows


async def _rounds(store: LiveStore, maker: Maker, chains: int, rng: random.Random, rounds: int = 3) -> list[int]:
    """Every chain once a round, in a new order each; the first round fills and is not counted."""
    order, found = list(range(chains)), []
    for number in range(rounds + 1):
        rng.shuffle(order)
        for chain in order:
            first = chain * _CHAIN_BLOCKS
            blocks = [maker.block(first + j, first + j - 1 if j else -1, j) for j in range(_CHAIN_BLOCKS)]
            fidelities = await visit(store, maker, blocks, _CHAIN_BLOCKS * BLOCK_TOKENS)
            found += fidelities if number else []
    return found


# ---- put


async def puts(count: int, redis: Any, size_bytes: int = 64 << 10) -> dict[str, list[float]]:
    """Seconds of single-block Puts into a node that is full and one that has room, in turns, ``[count]`` each."""
    roomy = (count + 64) * size_bytes
    full = max(count // 4, 32) * size_bytes
    maker, transport = Maker("puts", Shape((size_bytes,), (0.0,))), GrpcTransport()
    samples: dict[str, list[float]] = {"put.evicting_s": [], "put.roomy_s": []}
    async with (
        LiveStore(redis, "put-full", nodes=1, arena_bytes=full, page_bytes=_PAGE, policy="value") as evicting,
        LiveStore(redis, "put-roomy", nodes=1, arena_bytes=roomy, page_bytes=_PAGE, policy="value") as other,
    ):
        addresses = {"put.evicting_s": evicting.client.nodes()[0].address, "put.roomy_s": other.client.nodes()[0].address}

        async def put(name: str, number: int) -> float:
            messages = list(put_messages([(maker.block(number), BLOCK_TOKENS)]))
            began = time.perf_counter()
            await transport.put(addresses[name], messages, 10.0)
            return time.perf_counter() - began

        for number in range(full // size_bytes):
            await put("put.evicting_s", number)
        for number in range(-32, count):  # warm-up below 0
            for name in samples:
                seconds = await put(name, 10**6 + number)
                if number >= 0:
                    samples[name].append(seconds)
        totals = await evicting.totals()
        await transport.close()
    if totals["evictions"] < count:
        raise ConfigError(f"the full node evicted {totals['evictions']} blocks in {count} puts; the benchmark measured nothing")
    return samples


def _put_row(samples: dict[str, list[float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"part": "put", "block_bytes": 64 << 10, "puts": len(samples["put.roomy_s"])}
    for name in ("evicting", "roomy"):
        ordered = sorted(samples[f"put.{name}_s"])
        row |= {f"{name}_p50_ms": 1e3 * ordered[len(ordered) // 2], f"{name}_p99_ms": 1e3 * ordered[int(0.99 * (len(ordered) - 1))]}
    return row | {"p99_ratio": row["evicting_p99_ms"] / row["roomy_p99_ms"]}


# ---- for people


def plot(result: Result) -> str:
    """The cliff as an SVG."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in result.rows:
        if row["part"] == "cliff":
            series.setdefault(row["store"], []).append((row["working_set_to_memory"], 100 * row["hit_rate"]))
    title = "A working set that outgrows the memory"
    return line_plot(series, title=title, x_label="working set (raw bytes) / memory", y_label="blocks hit, %", log_x=True)


def render(result: Result) -> str:
    """The table for people."""
    lines = []
    for row in result.rows:
        if row["part"] == "agreement":
            live, expected = 100 * row["live_hit_rate"], 100 * row["replay_hit_rate"]
            lines.append(f"{result.configuration['trace']}: live {live:.2f} %, replay {expected:.2f} % of tokens hit")
        elif row["part"] == "put":
            evicting, roomy = row["evicting_p99_ms"], row["roomy_p99_ms"]
            lines.append(f"put p99: {evicting:.2f} ms evicting, {roomy:.2f} ms with room ({row['p99_ratio']:.2f}x)")
        else:
            hit, quality, size = 100 * row["hit_rate"], 100 * row["quality_weighted_hit_rate"], row["working_set_to_memory"]
            lines.append(f"{row['store']:<28} working set {size:>5g}x memory: {hit:6.1f} % hit, {quality:6.1f} % weighted")
    return "\n".join(lines)
