"""What `value` sees of a request does not depend on how the request reaches it."""

from __future__ import annotations

import pytest

from kvstore.eviction.base import BlockInfo, Request
from kvstore.eviction.value import ValuePolicy

TOKENS = 512


def blocks(first: int, stop: int) -> list[BlockInfo]:
    return [BlockInfo(number, number - 1 if number else None, number, (1,), (1.0,)) for number in range(first, stop)]


@pytest.mark.parametrize("new", [1, 8, 20])
def test_the_new_blocks_of_a_request_in_parts_are_of_the_same_class_as_those_of_a_whole_one(new: int) -> None:
    whole, parts = ValuePolicy(), ValuePolicy()
    for policy in (whole, parts):
        policy.access(Request(1, 0.0, 10 * TOKENS), blocks(0, 10))
    turn = Request(2, 20.0, (10 + new) * TOKENS)
    whole.access(turn, blocks(0, 10 + new))
    parts.access(turn, blocks(0, 10))  # a Get
    parts.access(turn, blocks(10, 10 + new))  # and a Put
    seen = [[policy._state[policy.table.find(block.id)] for block in blocks(10, 10 + new)] for policy in (whole, parts)]
    assert seen[0] == seen[1]


def test_recency_gives_up_the_end_of_a_request_in_parts_before_its_beginning() -> None:
    chain, other = blocks(0, 40), [BlockInfo(100 + depth, 99 + depth if depth else None, depth, (1,), (1.0,)) for depth in range(5)]
    found = []
    for part in (40, 8, 1):
        policy = ValuePolicy()
        for at in range(0, 40, part):
            policy.access(Request(1, at / 10, 40 * TOKENS), chain[at : at + part])
        for block in reversed(chain[25:]):
            policy.removed(block.id)
        policy.access(Request(2, 20.0, 5 * TOKENS), other)
        policy.access(Request(3, 30.0, 40 * TOKENS), chain)
        found.append(policy.rival.gained)
    assert found == [0, 0, 0], "25 were there and are hit, and recency has 25"
