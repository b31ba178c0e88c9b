"""Recency beside the learnt order: its hits are counted right, and it takes over where learning loses."""

from __future__ import annotations

from functools import cache

import pytest

from kvstore.eviction import create
from kvstore.eviction.replay import capacity_of, replay
from kvstore.eviction.rival import Rival
from kvstore.eviction.trace import Trace
from tests import traffic

REQUESTS = 500
SEEDS = (7, 8, 9)


@cache
def made(kind: str, seed: int = SEEDS[0]) -> Trace:
    return traffic.trace(kind, seed, REQUESTS)


def test_the_newest_blocks_are_those_that_recency_holds() -> None:
    rival = Rival()
    for second in range(5):
        rival.came(float(second), 10, 25)
    assert rival.edge < 2.0 < rival.cutoff < 3.0 and rival.spare == 5, "two requests whole, and 5 blocks of the one before"
    rival.left(4.0, 10)
    rival.came(5.0, 10, 25)
    assert rival.edge < 2.0 < rival.cutoff < 3.0, "what is used again leaves its old place"
    rival.came(6.0, 10, 1000)
    assert rival.cutoff < 0.0, "where there is room for all, all would be there"
    rival.came(7.0, 100, 25)
    assert rival.cutoff > 7.0 and rival.spare == 25, "of a prompt that is larger than the room, its beginning"


@pytest.mark.parametrize("kind", ["agents", "chat", "fading"])
@pytest.mark.parametrize("share", [0.05, 0.2])
def test_the_account_is_that_of_a_store_in_order_of_recency(kind: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = [0, 0]

    def judge(_: Rival, asked: int, hits: int, rival_hits: int, begins: bool) -> bool:
        counted[0] += asked
        counted[1] += rival_hits
        return False

    monkeypatch.setattr(Rival, "judge", judge)
    trace = made(kind)
    replay(trace, create("value"), capacity_of(trace, share))
    recency = replay(trace, create("lru"), capacity_of(trace, share)).token_hit_rate
    assert counted[1] / counted[0] == pytest.approx(recency, abs=0.04), "in blocks, not tokens, and those of partial blocks are few"


def test_recency_leads_when_learning_loses_and_for_longer_each_time() -> None:
    rival, led = Rival(), []
    for number in range(2000):
        if rival.judge(100, 80, 90) and rival.leads:
            led.append(number)
    pauses = [after - before for before, after in zip(led, led[1:], strict=False)]
    assert 20 < led[0] < 40, "a loss of a tenth, and 2.4 requests' worth allowed"
    assert all(after > 1.5 * before for before, after in zip(pauses, pauses[1:], strict=False))
    assert len(led) <= 6
    rival = Rival()
    assert not any(rival.judge(100, 85 + number % 20, 90) for number in range(2000)), "a lead that wavers is none of its business"


def test_a_request_in_parts_counts_as_one() -> None:
    whole, parts, led = Rival(), Rival(), [0, 0]
    for _ in range(500):
        whole.judge(100, 80, 90)
        parts.judge(80, 80, 80)
        for _ in range(20):
            parts.judge(1, 0, 0, False)
        parts.judge(0, 0, 10, False)
        led[0] += whole.leads
        led[1] += parts.leads
    assert led[0] > 200 and abs(led[0] - led[1]) <= 10


@pytest.mark.parametrize("kind", traffic.KINDS)
def test_value_is_hardly_ever_below_recency(kind: str) -> None:
    for share in (0.05, 0.2):
        ahead = []
        for seed in SEEDS:
            trace = made(kind, seed)
            learnt, recency = (replay(trace, create(name), capacity_of(trace, share)).token_hit_rate for name in ("value", "lru"))
            ahead.append(learnt - recency)
        assert sum(ahead) / len(ahead) > -0.01, "the cost of the first chances, in so short traces"
