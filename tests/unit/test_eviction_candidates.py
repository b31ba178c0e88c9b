"""Candidates against what their shortcuts stand for: `replace` for removing and adding, the leader and the heap for a look at all ends."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

import pytest

from kvstore.eviction.candidates import DEPTH_SCALE, Candidates
from kvstore.eviction.ladder import Step
from kvstore.eviction.reuse import EDGES_S, bucket

SLOTS, KEYS = 80, 6


class Twins:
    """Two `Candidates` of the same blocks; the second is never told to replace, and is asked through all ends of its groups."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.last_used = array("d", [0.0] * SLOTS)
        self.depth = [self.rng.randrange(40) for _ in range(SLOTS)]
        self.curves = {key: self._draw() for key in range(KEYS)}
        self.key: dict[int, int] = {}
        self.kept_from = float("inf")
        self.twins = [Candidates(self.curve, self.last_used, self.depth, refresh_s=0.0) for _ in range(2)]
        for twin in self.twins:
            twin.reserve(SLOTS)

    def curve(self, key: int) -> tuple[Sequence[float], Step]:
        return self.curves[key], Step(None, 0.5 + key % 2)

    def add(self, key: int, time: float, slots: list[int]) -> None:
        for slot in slots:
            self.last_used[slot], self.key[slot] = time, key
        for twin in self.twins:
            twin.add(key, slots)

    def remove(self, slot: int) -> None:
        del self.key[slot]
        for twin in self.twins:
            twin.remove(slot)

    def replace(self, slot: int, other: int) -> None:
        key = self.key[other] = self.key.pop(slot)
        self.last_used[other] = self.last_used[slot]
        self.twins[0].replace(slot, other)
        self.twins[1].remove(slot)
        self.twins[1].add(key, (other,))

    def change_curves(self, now: float) -> None:
        self.curves = {key: self._draw() for key in range(KEYS)}
        self.kept_from = self.rng.uniform(0.0, now) if self.rng.random() < 0.5 else float("inf")
        for twin in self.twins:
            twin.kept_from = self.kept_from
            twin.stale()

    def price(self, slot: int, now: float) -> float:
        values, step = self.curve(self.key[slot])
        age_s = now - self.last_used[slot]
        if self.last_used[slot] >= self.kept_from:
            return 1e9 * step.loss / (age_s + 1.0)
        return values[bucket(age_s)] * step.loss * DEPTH_SCALE / (DEPTH_SCALE + self.depth[slot])

    def check(self, now: float) -> None:
        first, second = (twin.cheapest(now) for twin in self.twins)
        assert first == second == self.twins[0].cheapest(now)
        ends = [end for group in self.twins[1]._groups if group.cells for end in (group.cells[0].head, group.cells[-1].tail)]
        assert (first is None) == (not self.key)
        assert first is None or first[0] == min(self.price(slot, now) for slot in ends) == self.price(first[1], now)

    def _draw(self) -> Sequence[float]:
        return [self.rng.random() for _ in EDGES_S]


@pytest.mark.parametrize("seed", range(8))
def test_shortcuts_answer_what_they_stand_for(seed: int) -> None:
    twins, now = Twins(seed), 0.0
    rng = twins.rng
    for _ in range(600):
        free, listed = [slot for slot in range(SLOTS) if slot not in twins.key], sorted(twins.key)
        kind = rng.random()
        if kind < 0.45 and free:
            now += rng.choice((0.0, 0.3, 4.0))
            time = now if rng.random() < 0.7 else rng.uniform(0.0, now)
            twins.add(rng.randrange(KEYS), time, rng.sample(free, min(len(free), rng.randint(1, 5))))
        elif kind < 0.6 and listed:
            twins.remove(rng.choice(listed))
        elif kind < 0.97 and listed and free:
            found = twins.twins[0].cheapest(now)
            twins.replace(found[1] if rng.random() < 0.7 else rng.choice(listed), rng.choice(free))
        elif kind >= 0.97:
            twins.change_curves(now)
        twins.check(now)
