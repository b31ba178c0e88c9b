"""Admission: bounds kept, order kept, nothing lost when somebody leaves the line."""

from __future__ import annotations

import asyncio

from services.engine.admission import Admission, Take


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


class Inn:
    """So many beds, and an admission of so many guests."""

    def __init__(self, requests: int, beds: int) -> None:
        self.admission, self.beds = Admission(requests), beds

    def guest(self, beds: int, order: int | None = None) -> Guest:
        return Guest(self, beds, order)


class Guest:
    """A request that stays until told to go; while it `waits` for somebody else, it does not want to come in."""

    arrivals = 0

    def __init__(self, inn: Inn, beds: int, order: int | None) -> None:
        Guest.arrivals += 1
        self.inn, self.beds, self.order = inn, beds, Guest.arrivals if order is None else order
        self.inside = self.waits = False
        self.go = asyncio.Event()
        self.task = asyncio.create_task(self._visit())

    def take(self) -> Take:
        if self.waits:
            return Take.LATER
        if self.inn.beds < self.beds:
            return Take.NO_ROOM
        self.inn.beds -= self.beds
        return Take.TAKEN

    def leave(self) -> None:
        self.inn.beds += self.beds

    async def _visit(self) -> None:
        async with self.inn.admission.room(self.order, self.take, self.leave):
            self.inside = True
            await self.go.wait()
            self.inside = False
            self.leave()


async def test_number_and_room_are_bounded_and_order_is_kept():
    inn = Inn(requests=3, beds=10)
    guests = [inn.guest(beds) for beds in (6, 5, 1, 1)]
    await settle()
    assert [g.inside for g in guests] == [True, False, False, False] and inn.admission.waiting == 3
    guests[0].go.set()
    await settle()
    assert [g.inside for g in guests] == [False, True, True, True]
    assert (inn.admission.free_requests, inn.beds) == (0, 3)
    for guest in guests:
        guest.go.set()
    await settle()
    assert (inn.admission.free_requests, inn.beds, inn.admission.waiting) == (3, 10, 0)


async def test_who_comes_back_goes_before_all_that_came_later():
    inn = Inn(requests=1, beds=1)
    first, second, third = inn.guest(1), inn.guest(1), inn.guest(1)
    await settle()
    back = inn.guest(1, order=first.order)
    await settle()
    for leaving, entering in ((first, back), (back, second), (second, third)):
        leaving.go.set()
        await settle()
        assert entering.inside


async def test_who_waits_for_somebody_lets_others_pass_until_poked():
    inn = Inn(requests=2, beds=2)
    follower = inn.guest(1)
    follower.waits = True
    other = inn.guest(1)
    await settle()
    assert other.inside and not follower.inside
    follower.waits = False
    inn.admission.poke()
    await settle()
    assert follower.inside


async def test_who_leaves_the_line_holds_nobody_up():
    inn = Inn(requests=2, beds=4)
    first, large, small = inn.guest(2), inn.guest(4), inn.guest(1)
    await settle()
    assert [g.inside for g in (first, large, small)] == [True, False, False]
    large.task.cancel()
    await settle()
    assert small.inside and inn.admission.waiting == 0


async def test_a_turn_that_comes_with_the_cancellation_is_given_back():
    inn = Inn(requests=1, beds=1)
    first, second = inn.guest(1), inn.guest(1)
    await settle()
    first.go.set()
    await asyncio.sleep(0)
    second.task.cancel()
    await settle()
    assert not second.inside and (inn.admission.free_requests, inn.beds) == (1, 1)
