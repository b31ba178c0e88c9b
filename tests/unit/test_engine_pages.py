"""Pages of the live cache: counted, kept in runs, shared; and which blocks of prompts are in them."""

from __future__ import annotations

import random

import pytest

from kvstore.block import Distortion, Provenance
from kvstore.errors import CapacityError
from services.engine.pages import Pages
from services.engine.prefixes import LiveBlock, LivePrefixes

EXACT, LOSSY = Provenance(), Provenance(1, Distortion(0.1, 0.2))


def test_runs_grow_where_there_is_room():
    pages = Pages(64)
    first = pages.take(4)
    second = pages.take(4)
    assert first == [0, 1, 2, 3] and second[0] - first[-1] > 8 and second[-1] < 20
    assert pages.take(2, first[-1]) == [4, 5] and pages.take(1, second[-1]) == [second[-1] + 1]


def test_single_pages_are_taken_where_no_run_is_left_and_never_more_than_there_are():
    pages = Pages(6)
    taken = pages.take(6)
    pages.give(taken[::2])
    with pytest.raises(CapacityError, match="4 pages"):
        pages.take(4)
    assert pages.take(3) == taken[::2] and pages.free == 0


def test_a_page_is_free_once_its_last_holder_has_given_it_back():
    pages, freed = Pages(4), []
    pages.on_free = lambda: freed.append(pages.free)
    taken = pages.take(2)
    pages.share(taken[:1])
    pages.give(taken)
    assert pages.free == 3
    pages.give(taken[:1])
    assert pages.free == 4 and freed == [3, 4]
    for wrong in (pages.give, pages.share):
        with pytest.raises(ValueError, match="free"):
            wrong(taken[:1])


def test_what_is_kept_apart_lies_at_the_far_end():
    pages = Pages(8)
    assert pages.take(2) == [0, 1] and pages.take_last(2) == [6, 7] and pages.take_last(0) == []
    pages.give([7])
    assert pages.take_last(2) == [5, 7]
    with pytest.raises(CapacityError, match="4 pages"):
        pages.take_last(4)
    assert pages.free == 3 and pages.check()


def test_an_exchange_changes_nothing_when_shared_pages_leave_too_few():
    pages = Pages(4)
    taken = pages.take(4)
    pages.share(taken[:3])
    with pytest.raises(CapacityError):
        pages.exchange(taken, 2)
    assert pages.free == 0
    pages.give(taken[:1])
    assert len(pages.exchange(taken, 2)) == 2 and pages.free == 0 and pages.check()


def test_counts_agree_after_any_sequence():
    rng, pages, held = random.Random(0), Pages(40), []
    for _ in range(2000):
        action = rng.choice(("take", "last", "share", "give", "exchange"))
        if action == "take" and pages.free:
            held.append(pages.take(rng.randint(1, pages.free), rng.choice([None, rng.randrange(40)])))
        elif action == "last":
            held.append(pages.take_last(rng.randint(0, pages.free)))
        elif held and action == "share":
            pages.share(run := rng.choice(held))
            held.append(list(run))
        elif held and action == "give":
            pages.give(held.pop(rng.randrange(len(held))))
        elif held and action == "exchange":
            at = rng.randrange(len(held))
            try:
                held[at] = pages.exchange(held[at], rng.randint(0, len(held[at])))
            except CapacityError:
                continue
        assert pages.check() and pages.total - pages.free == len({page for run in held for page in run})


@pytest.fixture
def shelf():
    """Pages, prefixes, and the keys of four blocks."""
    pages = Pages(16)
    return pages, LivePrefixes(pages), [bytes([n]) * 32 for n in range(4)]


def test_what_is_coming_is_waited_for_and_what_is_there_is_shared(shelf):
    pages, prefixes, keys = shelf
    assert prefixes.begin("a", keys, 4, 0) == []
    assert prefixes.begin("b", [*keys[:2], b"x" * 32], 3, 0) is None
    own = pages.take(2)
    prefixes.came("a", 0, [LiveBlock(own[0], EXACT)])
    assert prefixes.begin("b", [*keys[:2], b"x" * 32], 3, 0) is None
    prefixes.came("a", 1, [LiveBlock(own[1], EXACT)])
    assert [block.page for block in prefixes.begin("b", [*keys[:2], b"x" * 32], 3, 0)] == own
    prefixes.end("a")
    pages.give(own)
    assert pages.free == 14  # b holds them, and others find them there
    assert len(prefixes.begin("c", keys, 1, 0)) == 1


def test_what_does_not_come_is_waited_for_no_longer(shelf):
    _, prefixes, keys = shelf
    calls = []
    prefixes.on_progress = lambda: calls.append(prefixes.begin("b", keys, 4, 0))
    prefixes.begin("a", keys, 4, 0)
    assert prefixes.begin("b", keys, 4, 0) is None
    prefixes.end("a")
    assert calls == [[]]


def test_worse_blocks_than_asked_for_are_neither_taken_nor_waited_for(shelf):
    pages, prefixes, keys = shelf
    prefixes.begin("a", keys, 4, 0)
    prefixes.came("a", 0, [LiveBlock(page, LOSSY) for page in pages.take(4)])
    assert prefixes.begin("strict", keys, 4, 0.1) == []
    assert len(prefixes.begin("easy", keys, 4, 0.2)) == 4
    assert len(prefixes.begin("last token", keys, 3, 0)) == 3


def test_requests_that_come_and_go_stay_where_memory_has_been_written_to():
    rng, pages, held, aside, highest = random.Random(0), Pages(4096), [], [], 0
    for _ in range(2000):
        if len(held) == 8:
            pages.give(held.pop(rng.randrange(8)))
        held.append(pages.take(rng.randint(1, 6)))
        highest = max(highest, *held[-1])
        aside += pages.take_last(rng.randint(0, 3))
        pages.give(aside[:-64])
        aside = aside[-64:]
        assert min(aside, default=4095) > 4000
    assert highest < 8 * (6 + 2 * 8)
