"""Admission: bounds kept, order kept, nothing lost when somebody leaves the line."""

from __future__ import annotations

import asyncio

from services.engine.admission import Admission


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


class Guest:
    """A request that stays until told to go."""

    def __init__(self, admission: Admission, blocks: int) -> None:
        self.inside = False
        self.go = asyncio.Event()
        self.task = asyncio.create_task(self._visit(admission, blocks))

    async def _visit(self, admission, blocks):
        async with admission.room(blocks):
            self.inside = True
            await self.go.wait()
        self.inside = False


async def test_number_and_blocks_are_bounded_and_order_is_kept():
    admission = Admission(requests=3, blocks=10)
    guests = [Guest(admission, blocks) for blocks in (6, 5, 1, 1)]
    await settle()
    assert [g.inside for g in guests] == [True, False, False, False] and admission.waiting == 3
    guests[0].go.set()
    await settle()
    assert [g.inside for g in guests] == [False, True, True, True]
    assert (admission.free_requests, admission.free_blocks) == (0, 3)
    for guest in guests:
        guest.go.set()
    await settle()
    assert (admission.free_requests, admission.free_blocks, admission.waiting) == (3, 10, 0)


async def test_who_leaves_the_line_holds_nobody_up():
    admission = Admission(requests=2, blocks=4)
    first, large, small = Guest(admission, 2), Guest(admission, 4), Guest(admission, 1)
    await settle()
    assert [g.inside for g in (first, large, small)] == [True, False, False]
    large.task.cancel()
    await settle()
    assert small.inside and admission.waiting == 0
    small.task.cancel()
    first.task.cancel()
    await settle()
    assert (admission.free_requests, admission.free_blocks) == (2, 4)


async def test_a_turn_that_comes_with_the_cancellation_is_given_back():
    admission = Admission(requests=1, blocks=1)
    first, second = Guest(admission, 1), Guest(admission, 1)
    await settle()
    first.go.set()
    await asyncio.sleep(0)
    second.task.cancel()
    await settle()
    assert not second.inside and (admission.free_requests, admission.free_blocks) == (1, 1)
