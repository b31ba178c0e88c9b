"""Hit tokens of every policy on the first requests of real traces, to the token.

Rewrite ``tests/data/replay_hits.json`` only by ``python tests/golden/test_replay_hits.py`` and read the difference.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvstore.eviction import create, names
from kvstore.eviction.cluster_replay import replay_cluster
from kvstore.eviction.replay import Ladder, capacity_of, replay
from kvstore.eviction.trace import Trace, read_trace

DATA = Path(__file__).parent.parent / "data"
GOLDEN = DATA / "replay_hits.json"
TRACES = ("conversation_400", "agentic_150")
LADDER = Ladder.parse("1,0.5,0.25", "1,0.98,0.9")


def measure(trace: Trace) -> dict[str, int]:
    """Hit tokens by case."""
    hits = {}
    for share in (0.05, 0.2):
        capacity = capacity_of(trace, share)
        for name in names():
            hits[f"{name} {share:.0%}"] = replay(trace, create(name), capacity).hit_tokens
        for name in ("lru", "value"):
            outcome = replay(trace, create(name), capacity, LADDER)
            hits[f"{name} {share:.0%} ladder"] = outcome.hit_tokens
            hits[f"{name} {share:.0%} ladder, weighted"] = round(outcome.quality_tokens)
        hits[f"value {share:.0%} 4 nodes"] = replay_cluster(trace, "value", capacity, 4).hit_tokens
    return hits


@pytest.mark.parametrize("name", TRACES)
def test_hits_are_as_recorded(name: str) -> None:
    assert measure(read_trace(DATA / f"{name}.jsonl.gz")) == json.loads(GOLDEN.read_text())[name]


if __name__ == "__main__":
    recorded = {name: measure(read_trace(DATA / f"{name}.jsonl.gz")) for name in TRACES}
    GOLDEN.write_text(json.dumps(recorded, indent=1) + "\n")
