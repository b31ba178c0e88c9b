"""What is decided from measured rates."""

from __future__ import annotations

import pytest

from services.engine.rates import RETRY_EVERY, Rates


def rates(**options) -> Rates:
    """640 tokens a second: a block of 64 is computed in a tenth of one."""
    return Rates(640.0, 0.05, 10.0, **options)


def test_nothing_is_known_at_first_so_the_store_is_asked():
    assert rates().fetch_s(7) == 0 and rates().worth_fetching(1, 64)


def test_few_blocks_with_a_fixed_cost_are_computed_and_many_are_fetched():
    found = rates()
    for _ in range(3):
        found.fetched(1, 0.15)
        found.fetched(32, 0.4)
    assert not found.worth_fetching(1, 64)
    assert found.worth_fetching(32, 64) and found.worth_fetching(17, 64)
    assert found.worth_fetching(5, 64) is (0.4 < 0.5)


def test_more_blocks_than_were_measured_take_in_proportion():
    found = rates()
    found.fetched(4, 0.1)
    assert found.fetch_s(4) == found.fetch_s(1) == pytest.approx(0.1)
    assert found.fetch_s(16) == pytest.approx(0.4)


def test_an_unsteady_store_counts_as_its_slow_side():
    found = rates()
    for seconds in (0.02, 0.3) * 10:
        found.fetched(2, seconds)
    assert found.fetch_s(2) > 0.3 and not found.worth_fetching(2, 64)


def test_a_store_that_was_too_slow_is_tried_again_now_and_then():
    found = rates()
    found.fetched(1, 5.0)
    assert sum(found.worth_fetching(1, 64) for _ in range(3 * RETRY_EVERY)) == 3
    for _ in range(30):
        found.fetched(1, 0.01)
    assert found.worth_fetching(1, 64)


def test_who_always_fetches_does():
    found = rates(always=True)
    found.fetched(1, 5.0)
    assert all(found.worth_fetching(1, 64) for _ in range(20))


def test_the_time_for_the_store_has_bounds():
    found = rates()
    assert found.store_budget_s(6) == 0.05 and found.store_budget_s(640) == 0.5 and found.store_budget_s(64_000) == 10.0
    found.prefilled(640, 2.0)
    assert found.store_budget_s(640) > 0.5
