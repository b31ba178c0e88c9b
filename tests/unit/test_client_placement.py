"""Placement: new blocks of a request stay together, where the least value has to leave for them; nodes of any size fill alike."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest

from kvstore.client.placement import Placement
from kvstore.eviction.cluster import BINS, Pressure, bin_of
from kvstore.metadata import NodeRecord

MIB = 1 << 20
NUMBERS = itertools.count()


def node(name: str, arena: int, used: int = 0, value: float | None = None, host: str = "") -> NodeRecord:
    """A node whose used bytes are all of one value; None: it published no report."""
    record = NodeRecord(name, name * 16, f"{name}:1", arena_bytes=arena, used_bytes=used, host=host)
    if value is None:
        return record
    by_value = [0] * BINS
    by_value[bin_of(value)] = used
    return replace(record, pressure=Pressure(arena - used, arena, by_value).to_text())


def placed(placement: Placement, count: int, size: int = MIB) -> list[str]:
    return [placement.choose([b"%d" % next(NUMBERS)], size)[0] for _ in range(count)]


def test_equal_empty_nodes_take_turns():
    placement = Placement()
    placement.update([node("a", 64 * MIB), node("b", 64 * MIB)])
    assert placed(placement, 6) == ["a", "b"] * 3


def test_the_emptier_node_is_filled_first():
    placement = Placement()
    placement.update([node("a", 64 * MIB, 32 * MIB, 0.1), node("b", 64 * MIB)])
    assert Counter(placed(placement, 32)) == {"b": 32}
    assert Counter(placed(placement, 10)) == {"a": 5, "b": 5}


def test_full_nodes_give_their_least_valuable_bytes():
    placement = Placement()
    placement.update([node("a", 8 * MIB, 8 * MIB, 1.0), node("b", 8 * MIB, 8 * MIB, 0.01)])
    assert Counter(placed(placement, 8)) == {"b": 8}


def test_scraps_of_free_room_do_not_attract_a_long_prompt():
    placement = Placement()
    placement.update([node("a", 8 * MIB, 8 * MIB - 4096, 1.0), node("b", 8 * MIB, 8 * MIB, 0.01)])
    assert placed(placement, 1) == ["b"]


def test_full_nodes_without_reports_share_the_load():
    placement = Placement()
    placement.update([node("a", 64 * MIB, 64 * MIB), node("b", 64 * MIB, 64 * MIB)])
    assert set(placed(placement, 4)) <= {"a", "b"}


def test_a_new_report_replaces_what_was_guessed():
    placement = Placement()
    nodes = [node("a", 64 * MIB), node("b", 64 * MIB)]
    placement.update(nodes)
    placed(placement, 10)
    placement.update([*nodes])  # the same reports again: what was sent since still counts
    assert placed(placement, 2) == ["a", "b"]
    placement.update([node("a", 64 * MIB, 20 * MIB, 0.1), node("b", 64 * MIB, 1 * MIB, 0.1)])
    assert set(placed(placement, 10)) == {"b"}


def test_a_new_report_that_says_the_same_replaces_what_was_guessed_too():
    """A node that was cleared meanwhile is as it was when it was last heard of."""
    placement = Placement()
    nodes = [node("a", 8 * MIB), node("b", 8 * MIB)]
    placement.update(nodes)
    placed(placement, 16)
    placement.update([replace(nodes[0], beat=1), node("b", 8 * MIB, 4 * MIB, 0.1)])
    assert placed(placement, 2) == ["a", "a"]


def test_what_follows_goes_where_its_parent_was_sent_even_before_the_index_knows():
    placement = Placement()
    placement.update([node("a", 64 * MIB), node("b", 64 * MIB)])
    first = placement.choose([b"x", b"y"], 2 * MIB)
    assert placement.choose([b"z"], MIB, None, b"y") == first
    assert placement.choose([b"v"], MIB, "gone") != "gone", "a parent on a node that is gone decides nothing"


def test_a_node_is_chosen_by_the_price_of_all_that_is_coming():
    placement = Placement()
    placement.update([node("a", 64 * MIB, 60 * MIB, 1.0), node("b", 64 * MIB, 64 * MIB, 0.01)])
    assert placement.choose([b"x"], MIB)[0] == "a"
    assert placement.choose([b"y"], MIB, coming_bytes=31 * MIB)[0] == "b"
    placement.follow([b"z"], 31 * MIB, "b" * 16)
    assert placement.choose([b"v"], MIB, None, b"z")[0] == "a", "what followed took what was cheap"


def test_the_one_node_on_the_writers_host_is_preferred_at_an_equal_price():
    placement = Placement(host="here")
    placement.update([node("a", 64 * MIB), node("b", 64 * MIB, host="here")])
    assert placed(placement, 3) == ["b"] * 3
    placement.update([node("a", 64 * MIB, host="here"), node("b", 64 * MIB, host="here")])
    assert set(placed(placement, 8)) == {"a", "b"}


def test_a_node_that_joins_takes_what_is_new():
    placement = Placement()
    full = [node(name, 8 * MIB, 8 * MIB, 0.5) for name in "ab"]
    placement.update(full)
    assert set(placed(placement, 4)) == {"a", "b"}
    placement.update([*full, node("c", 8 * MIB)])
    assert placed(placement, 8) == ["c"] * 8


def test_no_node_is_an_error_of_the_caller():
    with pytest.raises(LookupError):
        Placement().choose([b"x"], MIB)
