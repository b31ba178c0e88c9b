"""The walk that removes what killed nodes left in the index."""

from __future__ import annotations

import random

from kvstore.clock import ManualClock
from kvstore.metadata import IndexEntry, InprocMetadata, NodeRecord
from kvstore.metadata.reconcile import GRACE_S, Reconciler

LOW, HIGH, DEAD = "0" * 16, "f" * 16, "d" * 16


def keys(count: int) -> list[bytes]:
    rng = random.Random(count)
    return [rng.randbytes(32) for _ in range(count)]


async def cluster(clock: ManualClock) -> InprocMetadata:
    metadata = InprocMetadata(clock)
    for incarnation in (LOW, HIGH):
        await metadata.heartbeat(NodeRecord(incarnation[:1], incarnation, "h:1"), 1000)
    return metadata


async def test_entries_of_the_dead_go_after_the_grace_and_no_others():
    clock = ManualClock()
    metadata = await cluster(clock)
    alive, shared, orphaned = keys(5), keys(6), keys(7)
    await metadata.announce(HIGH, [IndexEntry(k, 1, 1) for k in alive + shared])
    await metadata.announce(DEAD, [IndexEntry(k, 1, 1) for k in shared + orphaned])
    walker = Reconciler(metadata, LOW, clock, step_blocks=1000)
    assert await walker.step()
    clock.advance(GRACE_S - 1)
    await walker.step()
    assert walker.removed == 0
    clock.advance(2)
    await walker.step()
    assert walker.removed == 13
    assert metadata.state.holders.keys() == {*alive, *shared}
    assert all(len(places) == 1 for places in await metadata.locate(shared))


async def test_a_node_that_comes_back_keeps_its_entries():
    clock = ManualClock()
    metadata = await cluster(clock)
    await metadata.announce(DEAD, [IndexEntry(k, 1, 1) for k in keys(3)])
    walker = Reconciler(metadata, LOW, clock)
    await walker.step()
    clock.advance(GRACE_S + 1)
    await metadata.heartbeat(NodeRecord("d", DEAD, "h:2"), 5)
    await walker.step()
    clock.advance(6)  # silent again: the grace begins anew
    await walker.step()
    assert walker.removed == 0


async def test_only_the_node_with_the_smallest_incarnation_walks():
    clock = ManualClock()
    metadata = await cluster(clock)
    assert await Reconciler(metadata, HIGH, clock).step() is False
    assert await Reconciler(metadata, DEAD, clock).step() is False
    assert await Reconciler(metadata, LOW, clock).step() is True
    await metadata.leave(NodeRecord("0", LOW, "h:1"))
    assert await Reconciler(metadata, HIGH, clock).step() is True


async def test_the_walk_goes_over_the_whole_index_in_parts():
    clock = ManualClock()
    metadata = await cluster(clock)
    await metadata.announce(DEAD, [IndexEntry(k, 1, 1) for k in keys(40)])
    walker = Reconciler(metadata, LOW, clock, step_blocks=7)
    await walker.step()
    clock.advance(GRACE_S + 1)
    for _ in range(12):
        await walker.step()
    assert metadata.state.holders == {}
