"""The table of a policy's blocks: how many there are, and how much of them is held."""

from __future__ import annotations

from kvstore.eviction.base import BlockInfo
from kvstore.eviction.table import BlockTable


def test_a_block_counts_by_the_share_of_it_that_is_held() -> None:
    table = BlockTable()
    first = table.add(BlockInfo("a", None, 0, (8, 4, 2), (0.0, 0.1, 0.3)))
    second = table.add(BlockInfo("b", "a", 1))
    assert (len(table), table.size) == (2, 2.0)
    table.move(first, 2)
    assert (len(table), table.size) == (2, 1.25)
    table.remove(second)
    table.move(first, 0)
    assert (len(table), table.size) == (1, 1.0)
    table.move(first, 1)
    table.remove(first)
    assert (len(table), table.size) == (0, 0.0)
