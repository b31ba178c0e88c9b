"""What holds for every row of the table of policies."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import pytest

from kvstore.errors import ConfigError
from kvstore.eviction import DEFAULT, POLICIES, BlockInfo, EvictionPolicy, Request, create, names, policy_class
from kvstore.eviction.replay import Ladder, capacity_of, replay
from kvstore.eviction.trace import Trace, read_trace

DATA = Path(__file__).parent.parent / "data"
LADDER = Ladder.parse("1,0.5,0.25", "1,0.98,0.9")
ONLINE = [name for name in names() if not policy_class(name).sees_future]


@pytest.fixture(scope="module", params=["conversation_400", "agentic_150"])
def trace(request: pytest.FixtureRequest) -> Trace:
    return read_trace(DATA / f"{request.param}.jsonl.gz")


@pytest.mark.parametrize("name", names())
def test_name_and_construction(name: str) -> None:
    policy = create(name)
    assert isinstance(policy, EvictionPolicy)
    assert policy.name == name
    assert policy.victim(0.0) is None
    with pytest.raises(ConfigError, match="no_such"):
        create(name, no_such=1)


def test_the_default_is_in_the_table_and_unknown_names_are_refused() -> None:
    assert DEFAULT in POLICIES
    with pytest.raises(ConfigError, match="lru"):
        create("clairvoyant")


@pytest.mark.parametrize("share", [0.02, 0.1])
def test_no_policy_beats_the_bound(trace: Trace, share: float) -> None:
    capacity = capacity_of(trace, share)
    best = replay(trace, create("opt"), capacity).hit_tokens
    for name in ONLINE:
        assert replay(trace, create(name), capacity).hit_tokens <= best, name


@pytest.mark.parametrize("name", names())
def test_a_store_for_everything_hits_whatever_came_before(trace: Trace, name: str) -> None:
    everything = replay(trace, create(name), trace.distinct_blocks)
    assert everything.hit_tokens == replay(trace, create("opt"), 2 * trace.distinct_blocks).hit_tokens
    assert everything.evictions == everything.demotions == 0


@pytest.mark.parametrize("name", ["lru", "value"])
def test_a_ladder_hits_more_and_weighs_less(trace: Trace, name: str) -> None:
    capacity = capacity_of(trace, 0.1)
    plain, ladder = replay(trace, create(name), capacity), replay(trace, create(name), capacity, LADDER)
    assert ladder.demotions > 0 == plain.demotions
    assert ladder.hit_tokens > plain.hit_tokens == plain.quality_tokens
    assert 0.9 * ladder.hit_tokens <= ladder.quality_tokens < ladder.hit_tokens


@pytest.mark.parametrize("name", ONLINE)
def test_memory_is_bounded_ghosts_included(name: str) -> None:
    """4,000 resident blocks of 32-byte keys in chains of 8, after 16,000 more have come and gone."""
    resident, chain = 4_000, 8
    policy, keys, count = create(name), [], 0
    tracemalloc.start()
    for seq in range((16_000 + resident) // chain):
        blocks = []
        for depth in range(chain):
            key = (seq * chain + depth).to_bytes(32, "little")
            blocks.append(BlockInfo(key, blocks[-1].id if blocks else None, depth))
        keys.append([block.id for block in blocks])
        policy.access(Request(seq, float(seq), 512 * chain), blocks)
        count += chain
        while count > resident:
            policy.removed(policy.victim(float(seq)).id)
            count -= 1
    before = tracemalloc.get_traced_memory()[0]
    del policy, blocks
    gc.collect()
    bytes_a_block = (before - tracemalloc.get_traced_memory()[0]) / resident
    tracemalloc.stop()
    assert 20 <= bytes_a_block <= 200


def test_opt_refuses_to_run_without_the_future() -> None:
    with pytest.raises(ConfigError, match="replay"):
        create("opt").access(Request(0, 0.0), [BlockInfo(1, None, 0)])
