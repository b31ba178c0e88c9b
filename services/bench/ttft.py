"""``bench ttft``: time to first token, cold against warm.

One prompt for all lengths: each shorter one is a beginning of the longest, so that one publication serves all of them. Every codec and path
has an engine of its own in this process, all on the same store nodes, each codec under a tenant of its own, so that none reads what
another wrote. Cold is the same request with the store passed by, and takes its turn in every round.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstore.client import ClientConfig, KvClient
from kvstore.codecs import Profile, codec_class, names
from kvstore.settings import parse_size
from services.engine.base import CacheMode
from services.engine.config import EngineConfig
from services.engine.transformers_engine import TransformersEngine
from services.plot import line_plot
from services.profiles.obtain import find

from .base import Result, log
from .workload import Answer, add_device, ask, ask_together, percentile, summary_ms, system, text_prompts

LENGTHS, QUICK_LENGTHS = (256, 512, 1024, 2048, 4096, 6000), (256, 1024, 2048)
#: Of the requests that come at once.
MIXED, QUICK_MIXED = (64, 116, 209, 377, 681, 1229, 2217, 4000), (64, 90, 126, 176, 246, 344, 482, 674)
#: Of the prompts that arrive beside a running stream.
INTRUDERS, QUICK_INTRUDERS = (4000, 4000), (2000,)
STREAM_PROMPT, STREAM_TOKENS = 64, 160
TRANSFORM_RATIO = 16.0
#: The codec whose engine stands for cold, for mixed lengths and for the stream, and with which each path is measured.
MAIN = "int8"
#: Name of a path -> `ClientConfig.paths`; gRPC is what is left where no other way is allowed.
PATHS = {"local": "local", "grpc": ""}
ARENA = "384MiB"
SETTLE_S, SETTLE_STEP_S = 30.0, 0.2


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="", metavar="DIR", help="directory or hub name of a causal LM (default: the default model)")
    add_device(parser)
    parser.add_argument("--arena", metavar="SIZE", help="of each of the two nodes (384MiB; larger models want more)")
    parser.add_argument("--profile", metavar="FILE", help="profile for transform (default: the one on this machine)")
    parser.add_argument("--codec", nargs="+", choices=names(), help="these beside int8 (default: all; transform with --quick)")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", help="prompt lengths")
    parser.add_argument("--rounds", type=int, help="warm rounds (5; 3 with --quick); cold takes part in the first two")


@dataclass(slots=True)
class Contestant:
    """An engine that reads and writes one codec over one path."""

    name: str
    codec: str
    path: str
    engine: TransformersEngine

    @property
    def tenant(self) -> str:
        """Both paths of a codec read the same blocks."""
        return f"bench-{self.codec}"


def run(args: argparse.Namespace) -> Result:
    from services.model.resolve import resolve_model

    model = resolve_model(args.model)
    lengths = sorted(args.lengths or (QUICK_LENGTHS if args.quick else LENGTHS))
    rounds = args.rounds or (3 if args.quick else 5)
    profile, arena_bytes = find(model, args.profile), parse_size(args.arena or ARENA)
    chosen = args.codec or ([MAIN, "transform"] if args.quick else names())
    without = [] if profile else [c for c in chosen if codec_class(c).uses_profile]
    if without:
        log(f"bench: no profile of {model.name} here, so without {', '.join(without)}; make one with `concertina calibrate`")
    chosen = [MAIN, *(c for c in chosen if c not in (MAIN, *without))]
    configuration = {
        "model": model.name, "device": args.device, "lengths_tokens": lengths, "rounds": rounds, "codecs": chosen,
        "transform_ratio": TRANSFORM_RATIO, "profile": profile.digest.hex()[:16] if profile else None,
        "nodes": 2, "arena_bytes": arena_bytes, "paths": PATHS,
        "mixed_tokens": QUICK_MIXED if args.quick else MIXED, "intruders_tokens": QUICK_INTRUDERS if args.quick else INTRUDERS,
    }  # fmt: skip
    result = Result("ttft", configuration)
    with system(None, workers=0, arena_bytes=arena_bytes, device=args.device) as store:
        asyncio.run(_measure(result, model, store.redis, profile))
    return result


async def _measure(result: Result, model: Path, redis: str, profile: Profile | None) -> None:
    asked = result.configuration
    async with contextlib.AsyncExitStack() as stack:
        contestants = []
        for codec in asked["codecs"]:
            for path in PATHS if codec == MAIN else ["local"]:
                contestants.append(await stack.enter_async_context(_engine(model, redis, codec, path, profile, asked["device"])))
        main = contestants[0]
        result.configuration["dtype"] = str(main.engine.info.layout.dtype).removeprefix("torch.")
        (prompt,) = text_prompts(main.engine, [asked["lengths_tokens"][-1] + 1])
        probe = KvClient(ClientConfig(redis_url=redis))
        await probe.start()
        stack.push_async_callback(probe.close)
        settling = Settling(probe)
        for contestant in {c.codec: c for c in reversed(contestants)}.values():
            log(f"bench: publishing {len(prompt)} tokens as {contestant.codec}")
            await ask(contestant.engine, prompt, 1, tenant=contestant.tenant)
            await settling.wait([len(prompt)], main.engine.info.block_tokens)
        await _rounds(result, contestants, prompt)
        await _mixed(result, main, settling, skip=len(prompt))
        await _stream(result, main, skip=len(prompt) + sum(asked["mixed_tokens"]) + len(asked["mixed_tokens"]))
    _summarize(result, contestants)


@contextlib.asynccontextmanager
async def _engine(
    model: Path, redis: str, codec: str, path: str, profile: Profile | None, device: str
) -> AsyncIterator[Contestant]:  # fmt: skip
    needs = codec_class(codec).uses_profile
    config = EngineConfig(
        str(model), device=device, codec=codec, profile=profile if needs else None,
        codec_options={"ratio": TRANSFORM_RATIO} if needs else {}, always_fetch=True,
    )  # fmt: skip
    engine = TransformersEngine(config, ClientConfig(redis_url=redis, paths=PATHS[path]))
    log(f"bench: engine for {codec} over {path}")
    await engine.start()
    try:
        yield Contestant(f"{codec}.{path}", codec, path, engine)
    finally:
        await engine.stop()


class Settling:
    """Waits until blocks that are published behind the answers have reached the nodes."""

    def __init__(self, client: KvClient) -> None:
        self._client = client
        self._expected = 0

    async def wait(self, tokens: Sequence[int], block_tokens: int) -> None:
        """For the whole blocks of prompts of so many tokens. Goes on after `SETTLE_S` all the same: a miss shows in the results."""
        self._expected += sum(n // block_tokens for n in tokens)
        for _ in range(round(SETTLE_S / SETTLE_STEP_S)):
            if await self._blocks() >= self._expected:
                return
            await asyncio.sleep(SETTLE_STEP_S)

    async def _blocks(self) -> int:
        return sum([(await self._client.admin.stats(node)).blocks for node in self._client.nodes()])


async def _rounds(result: Result, contestants: list[Contestant], prompt: list[int]) -> None:
    """Each length warm through every contestant, and cold; in milliseconds."""
    main, rounds = contestants[0], result.configuration["rounds"]
    for number in range(-1, rounds):
        log(f"bench: round {number + 1} of {rounds}")
        for length in result.configuration["lengths_tokens"]:
            tokens = prompt[: length + 1]  # the last token is never cached, so that `length` tokens can be
            if 0 <= number < 2:
                cold = await ask(main.engine, tokens, 1, cache_mode=CacheMode.BYPASS)
                result.samples.setdefault(f"cold.{length}.ttft_ms", []).append(1e3 * cold.ttft_s)
            for contestant in contestants:
                warm = await ask(contestant.engine, tokens, 1, tenant=contestant.tenant, cache_mode=CacheMode.READ_ONLY)
                if number >= 0:
                    _note_warm(result, f"{contestant.name}.{length}", warm)


def _note_warm(result: Result, name: str, answer: Answer) -> None:
    cache, timing = answer.last.cache, answer.last.timing
    values = {
        "ttft_ms": 1e3 * answer.ttft_s, "fetch_ms": timing.lookup_ms + timing.fetch_ms, "prefill_ms": timing.prefill_ms,
        "cached_tokens": cache.cached_tokens, "fetched_bytes": cache.bytes_fetched, "distortion": cache.distortion,
    }  # fmt: skip
    for key, value in values.items():
        result.samples.setdefault(f"{name}.{key}", []).append(value)


async def _mixed(result: Result, main: Contestant, settling: Settling, skip: int) -> None:
    """Requests of mixed lengths at once: the first time they are computed, then they come from the store."""
    lengths = result.configuration["mixed_tokens"]
    prompts = text_prompts(main.engine, [n + 1 for n in lengths], skip=skip)
    log(f"bench: {len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens at once")
    for name in ("cold", "warm"):
        for answer in await ask_together(main.engine, prompts, 4, tenant="bench-mixed"):
            result.samples.setdefault(f"mixed.{name}.ttft_ms", []).append(1e3 * answer.ttft_s)
            result.samples.setdefault(f"mixed.{name}.cached_tokens", []).append(answer.last.cache.cached_tokens)
        if name == "cold":
            await settling.wait([n + 1 for n in lengths], main.engine.info.block_tokens)


async def _stream(result: Result, main: Contestant, skip: int) -> None:
    """Gaps between the tokens of a stream, alone and while long prompts are computed beside it."""
    lengths = result.configuration["intruders_tokens"]
    first, *intruders = text_prompts(main.engine, [STREAM_PROMPT, *lengths], skip=skip)
    log(f"bench: a stream beside prompts of {lengths} tokens")
    stream = asyncio.create_task(ask(main.engine, first, STREAM_TOKENS, cache_mode=CacheMode.BYPASS))
    await asyncio.sleep(1.0)
    arrivals = [await ask(main.engine, prompt, 1, cache_mode=CacheMode.BYPASS) for prompt in intruders]
    answer = await stream
    began, ended = arrivals[0].asked, arrivals[-1].tokens_at[-1]
    beside = [g for at, g in zip(answer.tokens_at[1:], answer.gaps_s, strict=True) if began <= at <= ended]
    result.samples["stream.gap_ms"] = [1e3 * g for g in answer.gaps_s]
    result.samples["stream.gap_beside_prompts_ms"] = [1e3 * g for g in beside]


def _summarize(result: Result, contestants: list[Contestant]) -> None:
    lengths, samples = result.configuration["lengths_tokens"], result.samples
    for length in lengths:
        cold = statistics.median(samples[f"cold.{length}.ttft_ms"])
        result.rows.append({"contestant": "cold", "tokens": length, **summary_ms([v / 1e3 for v in samples[f"cold.{length}.ttft_ms"]])})
        for contestant in contestants:
            prefix = f"{contestant.name}.{length}."
            parts = {k.removeprefix(prefix): statistics.median(v) for k, v in samples.items() if k.startswith(prefix)}
            parts |= summary_ms([v / 1e3 for v in samples[f"{prefix}ttft_ms"]])
            parts["cold_to_warm"] = result.ratios[f"{contestant.name}.{length}.cold_to_warm"] = cold / parts["ttft_ms"]
            result.rows.append({"contestant": contestant.name, "tokens": length, **parts})
    for contestant in contestants:
        result.rows.append({"contestant": contestant.name, "break_even_tokens": _break_even(result, contestant.name)})
    mixed = {name: percentile(samples[f"mixed.{name}.ttft_ms"], 0.95) for name in ("cold", "warm")}
    result.ratios["mixed.p95_warm_to_cold"] = mixed["warm"] / mixed["cold"]
    gaps = samples["stream.gap_beside_prompts_ms"]
    result.ratios["stream.longest_gap_to_median"] = max(gaps) / statistics.median(gaps)
    result.ratios["stream.longest_gap_to_median_of_all"] = max(gaps) / statistics.median(samples["stream.gap_ms"])


def _break_even(result: Result, name: str) -> float | None:
    """Tokens from which on warm comes sooner than cold, on a line between the measured lengths; None where it never does."""
    lengths = result.configuration["lengths_tokens"]
    before = None
    for length in lengths:
        lead = statistics.median(result.samples[f"cold.{length}.ttft_ms"]) - statistics.median(result.samples[f"{name}.{length}.ttft_ms"])
        if lead > 0:
            return length if before is None else before[0] + (length - before[0]) * -before[1] / (lead - before[1])
        before = (length, lead)
    return None


def plot(result: Result) -> str:
    """Cold and warm over the length, as an SVG."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in result.rows:
        if "tokens" in row:
            series.setdefault(row["contestant"], []).append((row["tokens"], row["median_ms"]))
    title = "Time to first token"
    return line_plot(series, title=title, x_label="prompt tokens that can come from the store", y_label="ms", log_x=True, log_y=True)


def render(result: Result) -> str:
    """The tables for people."""
    lines = [f"{'':18} {'tokens':>6} {'median ms':>10} {'p95 ms':>8} {'fetch ms':>9} {'cached':>7} {'fetched KiB':>12} {'sooner':>7}"]
    for row in result.rows:
        if "tokens" not in row:
            continue
        line = f"{row['contestant']:18} {row['tokens']:>6} {row['median_ms']:>10.0f} {row['p95_ms']:>8.0f}"
        if "cold_to_warm" in row:
            line += f" {row['fetch_ms']:>9.0f} {row['cached_tokens']:>7.0f} {row['fetched_bytes'] / 1024:>12,.0f}"
            line += f" {row['cold_to_warm']:>7.1f}"
        lines.append(line)
    for row in result.rows:
        if "tokens" not in row:
            at = row["break_even_tokens"]
            lines.append(f"{row['contestant']}: sooner than computing from {f'{at:,.0f} tokens' if at else 'no measured length'} on")
    lines += [f"{name}: {result.ratios[name]:.2f}" for name in result.ratios if name.startswith(("mixed", "stream"))]
    return "\n".join(lines)
