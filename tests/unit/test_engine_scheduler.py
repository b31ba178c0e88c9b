"""The scheduler: order, bounds, and that streams are never starved by prompts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.scheduler import Entry, Plan, Scheduler


def scheduler(**changes) -> Scheduler:
    return Scheduler(**{"slots": 3, "tile": 4, "tiles": (1, 2, 4), "busy_tiles": 2, "rows": 2, **changes})


def run(s: Scheduler, plan: Plan) -> None:
    for id_, _, stop in plan.prefill:
        s.computed(id_, stop)


def test_a_prompt_is_cut_into_tiles_at_their_multiples():
    s = scheduler()
    s.add(Entry("a", 14, 4))
    assert s.plan() == Plan(prefill=(("a", 4, 8), ("a", 8, 12)))  # three would be possible, but 3 is no allowed number
    run(s, Plan(prefill=(("a", 8, 12),)))
    assert s.plan() == Plan(prefill=(("a", 12, 14),))


def test_a_step_takes_whole_tiles_of_several_requests_in_order_of_arrival():
    s = scheduler()
    s.add(Entry("a", 8, 0))
    s.add(Entry("b", 20, 0))
    assert s.plan() == Plan(prefill=(("a", 0, 4), ("a", 4, 8), ("b", 0, 4), ("b", 4, 8)))


def test_a_partial_tile_is_alone_in_its_step():
    s = scheduler()
    s.add(Entry("a", 5, 0))
    s.add(Entry("b", 3, 0))
    s.add(Entry("c", 4, 0))
    plans = []
    while len(plans) < 4:
        plan = s.plan()
        run(s, plan)
        plans += [plan.prefill] if plan.prefill else []
    assert plans == [(("a", 0, 4),), (("a", 4, 5),), (("b", 0, 3),), (("c", 0, 4),)]


def test_where_all_steps_have_one_number_of_rows_a_partial_tile_shares_one():
    s = scheduler(tiles=(1, 2, 3, 4), mixed=True)
    s.add(Entry("a", 5, 0))
    s.add(Entry("b", 3, 0))
    s.add(Entry("c", 8, 0))
    assert s.plan() == Plan(prefill=(("a", 0, 4), ("a", 4, 5), ("b", 0, 3), ("c", 0, 4)))


def test_decode_and_prefill_take_turns_and_the_gap_is_bounded():
    s = scheduler()
    s.add(Entry("a", 2, 0))
    run(s, s.plan())
    s.add(Entry("b", 40, 0))
    kinds = []
    for _ in range(6):
        plan = s.plan()
        assert len(plan.prefill) <= 2
        kinds.append("decode" if plan.decode else "prefill")
        run(s, plan)
    assert kinds == ["decode", "prefill"] * 3


def test_streams_give_way_to_prompts_that_are_nearly_done():
    """A burst of short prompts is computed in one go, so that its answers share their decode steps."""
    s = scheduler(slots=8, tiles=(1,), busy_tiles=1)
    for n in range(4):
        s.add(Entry(f"{n}", 4, 0))
    steps = []
    while any(not e.decoding for e in (*s.waiting.values(), *s.running.values())):
        plan = s.plan()
        steps.append("prefill" if plan.prefill else "decode")
        for id_, _, stop in plan.prefill:
            s.computed(id_, stop)
    assert steps == ["prefill", "prefill", "prefill", "decode", "prefill"]
    assert s.patience() == 1


def test_streams_give_way_to_no_long_prompt():
    s = scheduler(slots=8)
    for n, length in enumerate((16, 320, 320, 320)):
        s.add(Entry(f"{n}", length, 0))
    s.plan()
    s.computed("0", 16)
    assert s.patience() == 1


def test_more_streams_than_rows_take_turns():
    s = scheduler()
    for id_ in "abc":
        s.add(Entry(id_, 1, 0))
        run(s, s.plan())
    while not all(entry.decoding for entry in s.running.values()):
        run(s, s.plan())
    for id_ in "abc":
        s.running.move_to_end(id_)
    assert [s.plan().decode for _ in range(3)] == [("a", "b"), ("c", "a"), ("b", "c")]


def test_a_removed_request_frees_its_slot_for_the_next_in_line():
    s = scheduler(slots=1)
    s.add(Entry("a", 4, 0))
    s.add(Entry("b", 4, 0))
    s.plan()
    assert list(s.running) == ["a"] and list(s.waiting) == ["b"]
    s.remove("a")
    s.remove("unknown")
    assert s.plan().prefill == (("b", 0, 4),)


@pytest.mark.parametrize("entry", [Entry("a", 8, 8), Entry("a", 8, 3), Entry("known", 8, 0)])
def test_impossible_entries_are_refused(entry):
    s = scheduler()
    s.add(Entry("known", 4, 0))
    with pytest.raises(ValueError, match="cannot be queued"):
        s.add(entry)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=12))
def test_every_request_gets_all_its_tokens_whatever_the_mix(requests):
    s = scheduler()
    left = {}
    for number, (prompt, answer) in enumerate(requests):
        s.add(Entry(str(number), prompt, 0))
        left[str(number)] = answer
    computed = dict.fromkeys(left, 0)
    for _ in range(2000):
        plan = s.plan()
        if not plan.prefill and not plan.decode:
            break
        assert not (plan.prefill and plan.decode) and len(plan.decode) <= 2 and len(s.running) <= 3
        assert len(plan.prefill) in (0, 1, 2, 4)
        for id_, start, stop in plan.prefill:
            assert start == computed[id_] and start % 4 == 0 and stop - start <= 4
            computed[id_] = stop
            s.computed(id_, stop)
        for id_ in plan.decode:
            left[id_] -= 1
            if not left[id_]:
                s.remove(id_)
    assert not any(left.values()) and not s.running and not s.waiting
