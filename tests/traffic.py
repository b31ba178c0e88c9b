"""Made-up request traffic of many kinds, for judging an eviction policy on traces that nobody tuned it to.

Each kind is a generator of ``(seconds, prompt tokens, chain of block names)``; `KINDS` names them, `trace` makes one from a kind and a
seed. Blocks are named by their whole chain, so any two prompts share exactly their common prefix.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

from kvstore.eviction.trace import BLOCK_TOKENS, Trace

Prompt = tuple[float, Sequence[Any]]


def trace(kind: str, seed: int = 0, requests: int = 1500) -> Trace:
    """The first `requests` requests of traffic `kind`; the last block of each prompt is not full."""
    rng = random.Random(f"{kind} {seed}")
    names: dict[Any, int] = {}

    def rows() -> Iterator[tuple[float, int, list[int]]]:
        for now, labels in islice(KINDS[kind](rng), requests):
            chain, parent = [], -1
            for label in labels:
                parent = names.setdefault((parent, label), len(names))
                chain.append(parent)
            yield now, len(chain) * BLOCK_TOKENS - rng.randrange(BLOCK_TOKENS - 1), chain

    return Trace.of(f"{kind} {seed}", rows())


def sessions(
    rng: random.Random,
    every_s: float,
    pause_s: float,
    spread: float,
    stop: float,
    system: tuple[int, int],
    first: tuple[int, int],
    grows: tuple[int, int],
) -> Iterator[Prompt]:
    """Conversations that return with a longer prompt after log-normal pauses.

    Parameters
    ----------
    every_s : float
        Mean seconds between two starts.
    pause_s, spread : float
        Median seconds between turns, and the standard deviation of their logarithm.
    stop : float
        Chance that a turn is the last one.
    system : tuple of int
        Different system prompts, and blocks of each.
    first, grows : tuple of int
        Least and most blocks of the first turn, and of what each further turn adds.
    """
    due: list[tuple[float, int]] = [(0.0, 0)]
    prompts: dict[int, list[Any]] = {}
    while True:
        now, session = heapq.heappop(due)
        if session not in prompts:
            heapq.heappush(due, (now + rng.expovariate(1 / every_s), session + 1))
            kind = min(int(rng.paretovariate(1.0)), system[0])
            prompts[session] = [("system", kind, j) for j in range(system[1])] + [(session, j) for j in range(rng.randint(*first))]
        else:
            prompts[session] += [(session, now, j) for j in range(rng.randint(*grows))]
        yield now, [*prompts[session], (session, now, "tail")]
        if rng.random() >= stop:
            heapq.heappush(due, (now + rng.lognormvariate(0, spread) * pause_s, session))


def documents(rng: random.Random, count: int, blocks: tuple[int, int], pick: Callable[[int], int], every_s: float) -> Iterator[Prompt]:
    """Questions about documents; `pick(i)` says which of `count` request i asks about. A document stands before its question."""
    sizes = [rng.randint(*blocks) for _ in range(count)]
    now = 0.0
    for number in range(1 << 40):
        now += rng.expovariate(1 / every_s)
        which = pick(number)
        yield now, [*((which, j) for j in range(sizes[which % count])), ("question", number)]


def zipf(rng: random.Random) -> Iterator[Prompt]:
    """A few documents are asked about all the time, most hardly ever."""
    weights = [1 / (rank + 1) ** 0.9 for rank in range(400)]
    return documents(rng, 400, (2, 30), lambda _: rng.choices(range(400), weights)[0], 0.5)


def loop(rng: random.Random) -> Iterator[Prompt]:
    """The same documents over and over, in one order: what recency alone handles worst."""
    return documents(rng, 120, (4, 24), lambda number: number % 120, 1.0)


def shifting(rng: random.Random) -> Iterator[Prompt]:
    """The popular documents are others every 300 requests."""
    return documents(rng, 200, (3, 24), lambda number: number // 300 * 200 + min(int(rng.paretovariate(0.8)), 199), 0.7)


def fading(rng: random.Random) -> Iterator[Prompt]:
    """The newer a document, the more it is asked about: what recency handles best."""
    return documents(rng, 1 << 20, (2, 16), lambda number: max(number // 4 - int(rng.paretovariate(0.7)), 0), 0.7)


def uniform(rng: random.Random) -> Iterator[Prompt]:
    """Nothing to be learnt: every document is as likely as any other."""
    return documents(rng, 150, (2, 12), lambda _: rng.randrange(150), 1.0)


def scans(rng: random.Random) -> Iterator[Prompt]:
    """Conversations, and now and then a batch of long prompts that nobody asks again."""
    for number, (now, prompt) in enumerate(KINDS["chat"](rng)):
        yield now, prompt
        if number % 100 == 99:
            yield from ((now, [("batch", number, item, j) for j in range(25)]) for item in range(40))


def phases(rng: random.Random) -> Iterator[Prompt]:
    """Agents, then conversations, then a loop, in turns of 250 requests."""
    parts = [KINDS[kind](rng) for kind in ("agents", "chat", "loop")]
    offset = last = 0.0
    for number in range(1 << 40):
        stream = parts[number // 250 % len(parts)]
        now, prompt = next(stream)
        offset = max(offset, last - now) if number % 250 else last - now
        last = now + offset
        yield last, [(number // 250 % len(parts), label) for label in prompt]


def mixed(rng: random.Random) -> Iterator[Prompt]:
    """Agents, conversations and documents at one time."""
    parts = [(kind, KINDS[kind](rng)) for kind in ("agents", "chat", "zipf")]
    streams = [((now, [(kind, label) for label in prompt]) for now, prompt in part) for kind, part in parts]
    yield from heapq.merge(*streams, key=lambda row: row[0])


#: Kind -> generator of its prompts.
KINDS: dict[str, Callable[[random.Random], Iterator[Prompt]]] = {
    "agents": partial(sessions, every_s=60, pause_s=18, spread=1.0, stop=0.015, system=(5, 4), first=(20, 120), grows=(1, 6)),
    "fast agents": partial(sessions, every_s=60, pause_s=4.5, spread=1.0, stop=0.015, system=(5, 4), first=(20, 120), grows=(1, 6)),
    "few agents": partial(sessions, every_s=600, pause_s=8, spread=0.6, stop=0.004, system=(2, 20), first=(5, 40), grows=(1, 3)),
    "many agents": partial(sessions, every_s=6, pause_s=25, spread=1.3, stop=0.08, system=(8, 10), first=(2, 30), grows=(1, 4)),
    "even agents": partial(sessions, every_s=30, pause_s=10, spread=0.2, stop=0.02, system=(3, 6), first=(10, 60), grows=(1, 4)),
    "slow agents": partial(sessions, every_s=100, pause_s=90, spread=1.5, stop=0.03, system=(1, 30), first=(10, 80), grows=(1, 8)),
    "chat": partial(sessions, every_s=1.5, pause_s=110, spread=0.9, stop=0.45, system=(5, 1), first=(1, 8), grows=(1, 8)),
    "busy chat": partial(sessions, every_s=0.5, pause_s=40, spread=0.7, stop=0.3, system=(40, 3), first=(1, 4), grows=(1, 3)),
    "tools": partial(sessions, every_s=0.3, pause_s=12, spread=1.0, stop=0.7, system=(60, 12), first=(0, 6), grows=(0, 3)),
    "zipf": zipf,
    "loop": loop,
    "shifting": shifting,
    "fading": fading,
    "uniform": uniform,
    "scans": scans,
    "phases": phases,
    "mixed": mixed,
}
