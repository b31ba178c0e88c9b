"""Replay of a request trace through an eviction policy, with the binding semantics of DESIGN §8.

Requests are atomic and in file order. For each: 1. the longest prefix wholly present *before* it counts as hit; 2. every block of the
prompt is touched or inserted at the top rung; 3. while the store is over capacity, the policy demotes or drops, the request's own
blocks included.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import lcm
from typing import Any

from ..errors import ConcertinaError, ConfigError
from .base import EvictionPolicy, Request
from .trace import BLOCK_TOKENS, Trace

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Ladder:
    """The rungs of a fidelity ladder.

    Parameters
    ----------
    sizes : tuple of int
        Size of a block at each rung, in units of which the top rung has `sizes[0]`.
    quality : tuple of float
        Share of a token's quality that each rung keeps.
    """

    sizes: tuple[int, ...] = (1,)
    quality: tuple[float, ...] = (1.0,)

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(1.0 - q for q in self.quality)

    @classmethod
    def parse(cls, rungs: str = "1", quality: str | None = None) -> Ladder:
        """From ``"1,0.5,0.25"`` and ``"1,0.98,0.9"`` (left out: no loss).

        Raises
        ------
        ConfigError
            Unless rungs fall from 1, qualities do not rise from 1, and there are as many of each.
        """
        try:
            shares = [Fraction(text.strip()).limit_denominator(4096) for text in rungs.split(",")]
            kept = [float(text) for text in quality.split(",")] if quality else [1.0] * len(shares)
        except (ValueError, ZeroDivisionError) as error:
            raise ConfigError(f"a ladder is written 1,0.5,0.25 and its quality 1,0.98,0.9, not {rungs!r} and {quality!r}") from error
        if shares[0] != 1 or any(b >= a or b <= 0 for a, b in pairwise(shares)):
            raise ConfigError(f"the rungs of a ladder fall from 1 and stay above 0; {rungs!r} do not")
        if len(kept) != len(shares) or kept[0] > 1.0 or any(not 0.0 <= b <= a for a, b in pairwise(kept)):
            raise ConfigError(f"give one quality a rung, falling from 1: {len(shares)} numbers, not {quality!r}")
        if len(shares) > 16:
            raise ConfigError(f"a ladder has at most 16 rungs, not {len(shares)}")
        unit = lcm(*(share.denominator for share in shares))
        return cls(tuple(int(share * unit) for share in shares), tuple(kept))


@dataclass(slots=True)
class Outcome:
    """What a replay counted. `quality_tokens` are hit tokens weighted by the quality of the rung that they were found at."""

    trace: str
    policy: str
    capacity_blocks: int
    requests: int = 0
    tokens: int = 0
    hit_tokens: int = 0
    quality_tokens: float = 0.0
    demotions: int = 0
    evictions: int = 0
    seconds: float = 0.0
    nodes: list[dict[str, Any]] | None = None

    @property
    def token_hit_rate(self) -> float:
        return self.hit_tokens / max(self.tokens, 1)

    @property
    def quality_weighted_hit_rate(self) -> float:
        return self.quality_tokens / max(self.tokens, 1)

    def as_json(self) -> dict[str, Any]:
        """The object that ``concertina replay --json`` prints (contract)."""
        fields = ("trace", "policy", "capacity_blocks", "requests", "tokens", "hit_tokens", "token_hit_rate", "quality_weighted_hit_rate")
        out = {name: getattr(self, name) for name in fields}
        out |= {"evictions": self.evictions, "demotions": self.demotions, "seconds": self.seconds}
        return out if self.nodes is None else out | {"nodes": self.nodes}


def capacity_of(trace: Trace, share: float) -> int:
    """Blocks that `share` of the trace's distinct blocks are: max(1, round(share x distinct))."""
    return max(1, round(share * trace.distinct_blocks))


def count_hit(outcome: Outcome, standing: bytearray, blocks: Any, input_tokens: int, quality: tuple[float, ...]) -> int:
    """Count the longest present prefix of `blocks` as hit; its length in blocks. `standing[b]` is 0 for absent, else rung + 1."""
    found = 0
    for block in blocks:
        if not standing[block]:
            break
        found += 1
    tokens = min(BLOCK_TOKENS * found, input_tokens)
    outcome.requests += 1
    outcome.tokens += input_tokens
    outcome.hit_tokens += tokens
    if len(quality) == 1:
        outcome.quality_tokens += tokens * quality[0]
    elif found:
        weights = [quality[standing[block] - 1] for block in blocks[:found]]
        outcome.quality_tokens += BLOCK_TOKENS * sum(weights[:-1]) + (tokens - BLOCK_TOKENS * (found - 1)) * weights[-1]
    return found


def replay(
    trace: Trace, policy: EvictionPolicy, capacity_blocks: int, ladder: Ladder | None = None, progress: Progress | None = None
) -> Outcome:
    """Run `trace` through a fresh `policy` in a store of `capacity_blocks` full blocks.

    Parameters
    ----------
    ladder : Ladder, optional
        Rungs that the policy may demote to; none if left out.
    progress : callable, optional
        Told ``(requests done, requests in all)`` now and then.

    Raises
    ------
    ConcertinaError
        When the policy names a block that is not there (a bug of the policy).
    """
    ladder = ladder or Ladder()
    sizes, quality, infos = ladder.sizes, ladder.quality, trace.infos(ladder.sizes, ladder.losses)
    outcome = Outcome(trace.name, policy.name, capacity_blocks)
    capacity, used, standing = capacity_blocks * sizes[0], 0, bytearray(trace.distinct_blocks)
    begin = time.perf_counter()
    if policy.sees_future:
        policy.foresee([request.blocks for request in trace.requests])
    for seq, request in enumerate(trace.requests):
        blocks, now = request.blocks, request.now
        found = count_hit(outcome, standing, blocks, request.input_tokens, quality)
        policy.access(Request(seq, now, request.input_tokens), [infos[block] for block in blocks])
        for block in blocks[found:]:
            if not standing[block]:
                standing[block] = 1
                used += sizes[0]
        while used > capacity:
            used -= take_one(outcome, policy, standing, sizes, now)
        if progress and not seq % 64:
            progress(seq, len(trace.requests))
    outcome.seconds = time.perf_counter() - begin
    return outcome


def take_one(outcome: Outcome, policy: EvictionPolicy, standing: bytearray, sizes: tuple[int, ...], now: float) -> int:
    """Carry out one decision of the policy; units freed."""
    victim = policy.victim(now)
    if victim is None or not standing[victim.id]:
        raise ConcertinaError(f"policy {policy.name} named no resident block: {victim}")
    rung = standing[victim.id] - 1
    if victim.rung is None:
        standing[victim.id] = 0
        policy.removed(victim.id)
        outcome.evictions += 1
        return sizes[rung]
    if not rung < victim.rung < len(sizes):
        raise ConcertinaError(f"policy {policy.name} demotes from rung {rung} to {victim.rung} of {len(sizes)}")
    standing[victim.id] = victim.rung + 1
    policy.demoted(victim.id, victim.rung)
    outcome.demotions += 1
    return sizes[rung] - sizes[victim.rung]
