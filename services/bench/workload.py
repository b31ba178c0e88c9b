"""Requests to an engine in this process, with the arrival of each token; and systems to run them beside."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvstore.errors import ConfigError
from services.engine.base import Delta, Engine, GenerateSpec, SamplingParams
from services.system import launch, session
from services.system.plan import Plan
from services.system.record import SystemRecord

from .base import log

#: Characters of text that hold at least one token; enough to cut a prompt from without tokenizing all text there is.
CHARACTERS_PER_TOKEN = 8


@dataclass(slots=True)
class Answer:
    """One answer: when it was asked for and when each token came, in seconds of `time.perf_counter`; and its last delta."""

    asked: float
    tokens_at: list[float] = field(default_factory=list)
    last: Delta | None = None

    @property
    def ttft_s(self) -> float:
        return self.tokens_at[0] - self.asked

    @property
    def total_s(self) -> float:
        return self.tokens_at[-1] - self.asked

    @property
    def gaps_s(self) -> list[float]:
        """Between each two tokens."""
        return [b - a for a, b in zip(self.tokens_at, self.tokens_at[1:], strict=False)]


async def ask(engine: Engine, tokens: Sequence[int], new: int, **spec: Any) -> Answer:
    """One greedy answer of exactly `new` tokens; `spec` are more fields of `GenerateSpec`."""
    answer = Answer(time.perf_counter())
    request = GenerateSpec("bench", tuple(tokens), SamplingParams(new, ignore_eos=True), **spec)
    async for delta in engine.generate(request):
        answer.tokens_at += [time.perf_counter()] * len(delta.tokens)
        answer.last = delta
    return answer


async def ask_together(engine: Engine, prompts: Sequence[Sequence[int]], new: int, **spec: Any) -> list[Answer]:
    """All at once."""
    return await asyncio.gather(*(ask(engine, prompt, new, **spec) for prompt in prompts))


def text_prompts(engine: Engine, lengths: Sequence[int], skip: int = 0) -> list[list[int]]:
    """Prompts of these lengths cut one after the other out of the language reference, which every Python has.

    `skip` tokens of it are left out first, for prompts that no other call has made. Raises ConfigError where the text ends.
    """
    import pydoc_data.topics

    text, needed = "\n\n".join(pydoc_data.topics.topics.values()), skip + sum(lengths)
    ids = engine.tokenize(text[: needed * CHARACTERS_PER_TOKEN])
    if len(ids) < needed:
        raise ConfigError(f"there are only {len(ids)} tokens of text; ask for fewer or shorter prompts")
    prompts, at = [], skip
    for length in lengths:
        prompts.append(ids[at : at + length])
        at += length
    return prompts


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``, as `system` takes it."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="for models and arenas (%(default)s)")


@contextlib.contextmanager
def system(
    model: Path | None, *, workers: int, arena_bytes: int, codec: str = "int8", nodes: int = 2, device: str = "cpu"
) -> Iterator[SystemRecord]:
    """Redis, store nodes and workers of their own, for the length of a ``with`` block; arenas and models are on `device`."""
    name = f"bench-{os.getpid()}"
    plan = Plan(name, model, nodes=nodes, workers=workers, arena_bytes=arena_bytes, codec=codec, device=device)
    try:
        with session.interruptible(), session.fresh_system(name) as made:
            launch.launch(plan, made, log)
            yield made
            session.end(made)
    except session.Interrupted as interrupted:
        raise SystemExit(interrupted.status) from None


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all are not above."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]


def summary_ms(values_s: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile, in milliseconds."""
    return {"median_ms": 1e3 * statistics.median(values_s), "p95_ms": 1e3 * percentile(values_s, 0.95)}
