"""Replay over a simulated cluster: the policies of the nodes, their pressure reports and the placement are the very objects that run.

Lookup is over all nodes (the index knows where every block is). New blocks are placed by the request's *home*, the worker that its
session came to; each home knows the last report of every node and what it placed itself since. A node that is over its capacity takes
what its own policy names. Blocks whose parent was dropped on another node stay, count nothing and age away.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from . import create_online
from .base import BlockInfo, EvictionPolicy, Request
from .cluster import Placer, Pressure, is_admitted, waterline
from .replay import Ladder, Outcome, Progress, count_hit, take_one
from .trace import Trace

_SHARED_CHILDREN = 4
#: Seconds after which a report is made afresh in any case: live, a node's beat and a writer's read of it take up to half a second each.
_REPORT_S = 1.0


@dataclass(frozen=True, slots=True)
class Skew:
    """Share of the sessions that come to each node; they are drawn with `seed`."""

    weights: tuple[float, ...]
    seed: int = 1

    @classmethod
    def parse(cls, text: str | None, nodes: int) -> Skew:
        """From ``"55,25,15,5"``; equal shares if left out.

        Raises
        ------
        ConfigError
            Unless there is one share of at least 0 for each node, and a cluster of 1 to 4096 nodes.
        """
        if not 1 <= nodes <= 4096:
            raise ConfigError(f"--nodes must be 1 to 4096, not {nodes}")
        try:
            weights = tuple(float(part) for part in text.replace("-", ",").split(",")) if text else (1.0,) * nodes
        except ValueError as error:
            raise ConfigError(f"--skew is written 55,25,15,5, not {text!r}") from error
        if len(weights) != nodes or not all(0.0 <= weight < float("inf") for weight in weights) or not sum(weights):
            raise ConfigError(f"--skew needs one share for each of the {nodes} nodes, not {text!r}")
        return cls(weights)


@dataclass(slots=True)
class _Node:
    """One simulated node; sizes are in units of the ladder."""

    name: str
    policy: EvictionPolicy
    capacity: int
    used: int = 0
    sessions_tokens: int = 0
    placed: int = 0
    rejected: int = 0
    outcome: Outcome = field(default_factory=lambda: Outcome("", "", 0))

    def report(self, now: float) -> Pressure:
        return Pressure.of(max(self.capacity - self.used, 0), self.capacity, *self.policy.census(now))

    def as_json(self, full: int) -> dict[str, Any]:
        return {
            "node": self.name,
            "capacity_blocks": self.capacity / full,
            "used_blocks": self.used / full,
            "home_tokens": self.sessions_tokens,
            "placed_blocks": self.placed,
            "rejected_blocks": self.rejected,
            "evictions": self.outcome.evictions,
            "demotions": self.outcome.demotions,
        }


def replay_cluster(
    trace: Trace,
    policy: str,
    capacity_blocks: int,
    nodes: int,
    ladder: Ladder | None = None,
    *,
    skew: Skew | None = None,
    stale: int = 20,
    at_home: bool = True,
    progress: Progress | None = None,
) -> Outcome:
    """Run `trace` through a cluster of `nodes` that share `capacity_blocks`, each with its own policy object.

    Parameters
    ----------
    policy : str
        Name of the policy of every node.
    stale : int
        Requests between two pressure reports of a node, if they do not take longer than a second of the trace.
    at_home : bool
        Whether writers run on the nodes' hosts, and so prefer one; else all requests come to one writer, which prefers none.

    Raises
    ------
    ConfigError
        For a policy that sees the future, or less than one block a node.
    """
    if stale < 1 or capacity_blocks < nodes:
        raise ConfigError("a cluster needs --stale of at least 1 and a capacity of at least one block for each node")
    cluster = _Cluster(trace, policy, capacity_blocks, nodes, ladder or Ladder(), at_home)
    skew = skew or Skew((1.0,) * nodes)
    begin = time.perf_counter()
    last, reported = -stale, 0.0
    for seq, home in enumerate(_homes(trace, skew)):
        now = trace.requests[seq].now
        if seq - last >= stale or now - reported >= _REPORT_S:
            last, reported = seq, now
            cluster.report(now)
        cluster.serve(seq, home)
        if progress and not seq % 64:
            progress(seq, len(trace.requests))
    outcome = cluster.outcome
    outcome.seconds = time.perf_counter() - begin
    outcome.evictions = sum(node.outcome.evictions for node in cluster.nodes)
    outcome.demotions = sum(node.outcome.demotions for node in cluster.nodes)
    outcome.nodes = [node.as_json(cluster.ladder.sizes[0]) for node in cluster.nodes]
    return outcome


class _Cluster:
    def __init__(self, trace: Trace, policy: str, capacity_blocks: int, nodes: int, ladder: Ladder, at_home: bool) -> None:
        self.trace, self.ladder = trace, ladder
        self.infos: list[BlockInfo] = trace.infos(ladder.sizes, ladder.losses)
        self.outcome = Outcome(trace.name, policy, capacity_blocks)
        self.standing = bytearray(trace.distinct_blocks)
        self.at = [0] * trace.distinct_blocks
        self.nodes = []
        for number in range(nodes):
            share = (capacity_blocks * (number + 1) // nodes - capacity_blocks * number // nodes) * ladder.sizes[0]
            self.nodes.append(_Node(str(number), create_online(policy), share))
        self.placers = [Placer(node.name) for node in self.nodes] if at_home else [Placer()] * nodes
        self.waterline = 0.0
        self.lessons: list[bytes] = []

    def report(self, now: float) -> None:
        """All nodes publish their pressure and what they learnt, and hear of each other."""
        reports = {node.name: node.report(now) for node in self.nodes}
        self.waterline = waterline(list(reports.values()))
        for placer in self.placers:
            placer.update(reports)
        lessons = [node.policy.lessons() for node in self.nodes]
        if lessons == self.lessons:
            return
        self.lessons = lessons
        for number, node in enumerate(self.nodes):
            node.policy.heed(lessons[:number] + lessons[number + 1 :])

    def serve(self, seq: int, home: int) -> None:
        """One request, whose session belongs to the worker on node `home`."""
        request = self.trace.requests[seq]
        blocks = request.blocks
        count_hit(self.outcome, self.standing, blocks, request.input_tokens, self.ladder.quality)
        self.nodes[home].sessions_tokens += request.input_tokens
        asked = Request(seq, request.now, request.input_tokens)
        missing = [block for block in blocks if not self.standing[block]]
        unwanted = self._place(asked, missing, home) if missing else []
        parts: dict[int, list[BlockInfo]] = defaultdict(list)
        for block in blocks:
            parts[self.at[block]].append(self.infos[block])
        for number, part in parts.items():
            node = self.nodes[number]
            node.policy.access(asked, part)
        for block in reversed(unwanted):
            node = self.nodes[self.at[block]]
            node.policy.removed(block)
            node.used -= self.ladder.sizes[0]
            node.rejected += 1
            self.standing[block] = 0
        for number in parts:
            node = self.nodes[number]
            while node.used > node.capacity:
                node.used -= take_one(node.outcome, node.policy, self.standing, self.ladder.sizes, request.now)

    def _place(self, request: Request, missing: list[int], home: int) -> list[int]:
        """Put the new blocks of one request onto one node. Answers those that it does not admit: from the first on that is not worth it."""
        size, parent = self.ladder.sizes[0] * len(missing), self.trace.parents[missing[0]]
        near = str(self.at[parent]) if parent >= 0 and self.standing[parent] else None
        chosen = int(self.placers[home].choose(missing, size, near))
        node = self.nodes[chosen]
        node.placed += len(missing)
        node.used += size
        for block in missing:
            self.standing[block] = 1
            self.at[block] = chosen
        victim = node.policy.victim(request.now)
        if node.used <= node.capacity or victim is None:
            return []
        for number, block in enumerate(missing):
            if not is_admitted(node.policy.worth(request, self.infos[block]), victim.value, self.waterline):
                return missing[number:]
        return []


def _homes(trace: Trace, skew: Skew) -> Iterator[int]:
    """The home node of each request. A request belongs to the session of the deepest block seen before, unless that is a shared root."""
    rng = random.Random(skew.seed)
    session_of: dict[int, int] = {}
    children: dict[int, int] = defaultdict(int)
    homes: list[int] = []
    for request in trace.requests:
        deepest = None
        for block in request.blocks:
            if block not in session_of:
                break
            deepest = block
        if deepest is not None and children[deepest] < _SHARED_CHILDREN:
            session = session_of[deepest]
        else:
            session = len(homes)
            homes.append(rng.choices(range(len(skew.weights)), skew.weights)[0])
        for block in request.blocks:
            if block not in session_of:
                session_of[block] = session
                children[trace.parents[block]] += 1
        yield homes[session]
