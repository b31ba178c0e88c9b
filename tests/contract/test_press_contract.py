"""What holds for every press of the table."""

from __future__ import annotations

import pytest

from kvstore.errors import InvalidInputError
from services.engine.presses import PRESSES, create_press


@pytest.mark.parametrize("name", PRESSES)
@pytest.mark.parametrize("budget", [8, 9, 64, 1000])
@pytest.mark.parametrize("over", [0, 1, 500])
def test_a_press_keeps_its_budget_and_leaves_room(name, budget, over):
    press, room = create_press(name, budget), max(1, budget // 16)
    ranges = press.keep(budget + over, room)
    assert 1 <= sum(stop - start for start, stop in ranges) <= budget - room
    edges = [edge for span in ranges for edge in span]
    assert edges == sorted(set(edges)) and edges[0] >= 0 and edges[-1] <= budget + over


@pytest.mark.parametrize("name", PRESSES)
def test_a_cache_within_budget_is_kept_whole(name):
    assert create_press(name, 100).keep(50, 5) == [(0, 50)]


@pytest.mark.parametrize("name", PRESSES)
def test_a_budget_that_is_too_small_is_refused(name):
    with pytest.raises(InvalidInputError, match="budget of at least"):
        create_press(name, 0)


def test_an_unknown_press_is_refused_and_none_is_none():
    with pytest.raises(InvalidInputError, match="known: sliding_window"):
        create_press("squeeze", 100)
    assert create_press("", 0) is None
