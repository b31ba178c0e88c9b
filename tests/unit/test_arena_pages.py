"""The page allocator against a naive model: no page twice, exact counts, long runs, typed errors."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.arena import AccountingError, Extent, PageAllocator
from kvstore.errors import CapacityError, ConfigError


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.integers(1, 60), st.lists(st.tuples(st.booleans(), st.integers(0, 20) | st.lists(st.integers(0, 5), max_size=5)), max_size=80))
def test_every_page_has_at_most_one_owner(pages: int, steps: list[tuple[bool, int | list[int]]]) -> None:
    allocator = PageAllocator(pages)
    owned: list[tuple[Extent, ...]] = []
    for take, number in steps:
        if isinstance(number, list):
            free = allocator.free_pages
            if sum(number) > free:
                with pytest.raises(CapacityError):
                    allocator.alloc_all(number)
                assert allocator.free_pages == free
            else:
                owned += (taken := allocator.alloc_all(number))
                assert [sum(e.count for e in extents) for extents in taken] == number
        elif take:
            free = allocator.free_pages
            if number > free:
                with pytest.raises(CapacityError):
                    allocator.alloc(number)
                assert allocator.free_pages == free
            else:
                owned.append(allocator.alloc(number))
                assert sum(e.count for e in owned[-1]) == number
        elif owned:
            allocator.free(owned.pop(number % len(owned)))
        held = [page for extents in owned for e in extents for page in range(e.start, e.start + e.count)]
        assert len(held) == len(set(held)) == allocator.used_pages == pages - allocator.free_pages
        assert all(0 <= page < pages for page in held)
        allocator.check()


def test_takes_one_run_where_one_is_long_enough() -> None:
    allocator = PageAllocator(100)
    parts = [allocator.alloc(10) for _ in range(10)]
    allocator.free(parts[2])
    allocator.free(parts[5])
    allocator.free(parts[6])
    assert allocator.alloc(10) == (Extent(20, 10),), "the shortest run that is long enough"
    assert allocator.alloc(15) == (Extent(50, 15),), "freed neighbours have become one run"


def test_uses_several_runs_when_none_is_long_enough() -> None:
    allocator = PageAllocator(40)
    parts = [allocator.alloc(10) for _ in range(4)]
    allocator.free(parts[0])
    allocator.free(parts[2])
    taken = allocator.alloc(15)
    assert sorted(e.count for e in taken) == [5, 10]
    assert {e.start for e in taken} == {0, 20}


def test_after_everything_is_freed_the_arena_is_one_run_again() -> None:
    allocator = PageAllocator(1000)
    parts = [allocator.alloc(n) for n in (1, 7, 100, 3, 500)]
    for extents in parts[1::2] + parts[::2]:
        allocator.free(extents)
    assert allocator.alloc(1000) == (Extent(0, 1000),)


@pytest.mark.parametrize("wrong", [Extent(0, 4), Extent(1, 4), Extent(0, 6), Extent(50, 1)])
def test_freeing_what_is_not_allocated_is_an_error(wrong: Extent) -> None:
    allocator = PageAllocator(100)
    allocator.alloc(5)
    with pytest.raises(AccountingError):
        allocator.free([wrong])
    allocator.check()


def test_double_free_is_an_error() -> None:
    allocator = PageAllocator(10)
    extents = allocator.alloc(5)
    allocator.free(extents)
    with pytest.raises(AccountingError):
        allocator.free(extents)


def test_an_arena_has_pages() -> None:
    with pytest.raises(ConfigError, match="--arena"):
        PageAllocator(0)


def test_state_grows_with_runs_not_with_pages() -> None:
    allocator = PageAllocator(1 << 40)  # four PiB of pages
    extents = [allocator.alloc(11) for _ in range(1000)]
    allocator.free(e for part in extents for e in part)
    assert allocator.free_pages == 1 << 40
