"""Placement: nodes fill alike, by share of their arena, and a chain stays together for a run."""

from __future__ import annotations

from collections import Counter

from kvstore.client.placement import RUN_BLOCKS, Placement
from kvstore.metadata import NodeRecord

MIB = 1 << 20


def node(name: str, arena: int, used: int = 0) -> NodeRecord:
    return NodeRecord(name, name * 16, f"{name}:1", arena_bytes=arena, used_bytes=used)


def placed(placement: Placement, count: int) -> list[str]:
    return [placement.choose(MIB, 0, None)[0] for _ in range(count)]


def test_equal_nodes_take_turns():
    placement = Placement()
    placement.update([node("a", 64 * MIB), node("b", 64 * MIB)])
    assert placed(placement, 6) == ["a", "b"] * 3


def test_a_node_of_twice_the_size_gets_twice_as_much():
    placement = Placement()
    placement.update([node("a", 64 * MIB), node("b", 128 * MIB)])
    assert Counter(placed(placement, 90)) == {"a": 30, "b": 60}


def test_the_emptier_node_is_filled_first():
    placement = Placement()
    placement.update([node("a", 64 * MIB, used=32 * MIB), node("b", 64 * MIB)])
    assert Counter(placed(placement, 32)) == {"b": 32}
    assert Counter(placed(placement, 10)) == {"a": 5, "b": 5}


def test_full_nodes_still_share_the_load():
    placement = Placement()
    placement.update([node("a", 8 * MIB, used=8 * MIB), node("b", 8 * MIB, used=8 * MIB)])
    assert Counter(placed(placement, 40)) == {"a": 20, "b": 20}


def test_a_new_report_replaces_what_was_guessed():
    placement = Placement()
    nodes = [node("a", 64 * MIB), node("b", 64 * MIB)]
    placement.update(nodes)
    placed(placement, 10)
    placement.update(nodes)  # the same report again: what was sent since still counts
    assert placed(placement, 2) == ["a", "b"]
    placement.update([node("a", 64 * MIB, used=20 * MIB), node("b", 64 * MIB, used=1 * MIB)])
    assert set(placed(placement, 10)) == {"b"}


def chain(placement: Placement, count: int) -> list[str]:
    homes: list[str] = []
    for depth in range(count):
        homes.append(placement.choose(MIB, depth, homes[-1] if homes else None))
    return [home[0] for home in homes]


def test_a_chain_stays_together_for_a_run_and_then_moves_to_the_emptier_node():
    placement = Placement()
    placement.update([node("a", 640 * MIB), node("b", 640 * MIB)])
    assert chain(placement, 3 * RUN_BLOCKS) == ["a"] * RUN_BLOCKS + ["b"] * RUN_BLOCKS + ["a"] * RUN_BLOCKS


def test_a_child_of_a_node_that_is_gone_goes_where_there_is_room():
    placement = Placement()
    placement.update([node("a", 64 * MIB, used=MIB), node("b", 64 * MIB)])
    assert placement.choose(MIB, 5, "gone")[0] == "b"
