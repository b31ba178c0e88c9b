"""Which prefix counts, who is alive, and what a dead metadata store costs."""

from __future__ import annotations

import asyncio

from kvstore.clock import ManualClock
from kvstore.metadata import IndexEntry, NodeRecord
from tests.client_support import NODES, Bench, chain


class CountingMetadata:
    """Counts the calls that reach a metadata store."""

    def __init__(self, inner) -> None:
        self.inner = inner
        self.calls: list[str] = []

    def __getattr__(self, name):
        method = getattr(self.inner, name)
        if name in ("locate", "nodes", "withdraw"):
            self.calls.append(name)
        return method


async def test_only_the_leading_run_counts():
    async with Bench() as bench:
        keys = await bench.store(chain(10))
        await bench.metadata.withdraw(NODES[0].incarnation, [keys[6]])
        hits = await bench.client.lookup(keys)
        assert [h.key for h in hits] == keys[:6]
        assert [h.node.id for h in hits] == ["n0", "n1"] * 3
        assert await bench.client.lookup(keys[6:]) == []


async def test_the_best_copy_is_chosen_and_equal_ones_share_the_reads():
    async with Bench() as bench:
        keys = [b.header.key for b in chain(40)]
        await bench.metadata.announce(NODES[0].incarnation, [IndexEntry(k, 100, 2) for k in keys])
        await bench.metadata.announce(NODES[1].incarnation, [IndexEntry(k, 50, 1) for k in keys[:20]])
        await bench.metadata.announce(NODES[1].incarnation, [IndexEntry(k, 100, 2) for k in keys[20:]])
        hits = await bench.client.lookup(keys)
        assert {h.node.id for h in hits[:20]} == {"n0"}
        assert {h.node.id for h in hits[20:]} == {"n0", "n1"}
        assert {h.fidelity for h in hits} == {2}


async def test_a_node_that_has_just_joined_is_found_by_the_lookup_itself():
    async with Bench(refresh_s=30) as bench:
        newcomer = NodeRecord("n9", "9" * 16, "node9:1")
        keys = [b.header.key for b in chain(3)]
        await bench.metadata.heartbeat(newcomer, 60)
        await bench.metadata.announce(newcomer.incarnation, [IndexEntry(k, 1, 1) for k in keys])
        assert len(await bench.client.lookup(keys)) == 3


async def test_entries_of_a_dead_incarnation_are_ignored_and_cost_one_read_only():
    async with Bench(refresh_s=30) as bench:
        keys = await bench.store(chain(4))
        await bench.metadata.announce("d" * 16, [IndexEntry(k, 1, 3) for k in keys])
        assert [h.node.id for h in await bench.client.lookup(keys)] == ["n0", "n1"] * 2
        await bench.metadata.leave(NODES[1])
        counting = bench.client._membership.metadata = CountingMetadata(bench.metadata)
        await bench.client._membership.next_read()
        assert len(await bench.client.lookup(keys)) == 1
        before = counting.calls.count("nodes")
        for _ in range(5):
            assert len(await bench.client.lookup(keys)) == 1
        assert counting.calls.count("nodes") <= before + 1


async def test_entries_of_a_long_dead_incarnation_are_removed():
    clock = ManualClock()
    async with Bench(clock=clock, tidy_after_s=10, refresh_s=30) as bench:
        keys = [b.header.key for b in chain(3)]
        await bench.metadata.announce("d" * 16, [IndexEntry(k, 1, 1) for k in keys])
        await bench.client.lookup(keys)
        clock.advance(9)
        await bench.client.lookup(keys)
        await asyncio.sleep(0.02)
        assert len(bench.metadata.state.holders) == 3
        clock.advance(2)
        await bench.client.lookup(keys)
        await asyncio.sleep(0.02)
        assert bench.metadata.state.holders == {}


async def test_a_dead_metadata_store_is_asked_once_and_then_only_probed():
    async with Bench(refresh_s=0.05) as bench:
        keys = await bench.store(chain(3))
        counting = bench.client._membership.metadata = CountingMetadata(bench.metadata)
        bench.metadata.state.away = True
        for _ in range(20):
            assert await bench.client.lookup(keys) == []
        assert counting.calls.count("locate") <= 1
        assert bench.count("store_unavailable", "redis") >= 20
        assert not bench.client.available
        bench.metadata.state.away = False
        for _ in range(100):
            await asyncio.sleep(0.02)
            if bench.client.available:
                break
        assert len(await bench.client.lookup(keys)) == 3


async def test_a_lookup_keeps_its_deadline_when_the_metadata_hangs():
    async with Bench() as bench:
        keys = await bench.store(chain(3))

        async def hang(_):
            await asyncio.sleep(60)

        bench.metadata.locate = hang
        assert await asyncio.wait_for(bench.client.lookup(keys, deadline_s=0.05), 5) == []
        assert bench.count("store_unavailable", "redis") == 1


async def test_a_client_starts_without_any_store():
    bench = Bench(refresh_s=0.02)
    bench.metadata.state.away = True
    await bench.client.start()
    keys = [b.header.key for b in chain(2)]
    assert bench.client.nodes() == []
    assert await bench.client.lookup(keys) == []
    bench.metadata.state.away = False
    await bench.metadata.heartbeat(NODES[0], 60)
    await bench.metadata.announce(NODES[0].incarnation, [IndexEntry(k, 1, 1) for k in keys])
    for _ in range(100):
        if len(await bench.client.lookup(keys)) == 2:
            break
        await asyncio.sleep(0.02)
    assert len(await bench.client.lookup(keys)) == 2
    await bench.client.close()


async def test_a_fault_of_ours_in_one_read_does_not_freeze_the_membership(caplog):
    async with Bench(refresh_s=0.02) as bench:
        keys = await bench.store(chain(2))
        sound = bench.metadata.nodes

        async def faulty():
            raise ZeroDivisionError("a bug")

        bench.metadata.nodes = faulty
        await asyncio.sleep(0.1)
        assert "a bug" in caplog.text
        assert await bench.client.lookup(keys) == []
        bench.metadata.nodes = sound
        await asyncio.sleep(0.2)
        assert len(await bench.client.lookup(keys)) == 2
