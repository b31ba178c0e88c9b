"""Publishing: bounded, spread, skipped where it is already there, and never in the caller's way."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from kvstore.block import EncodedBlock
from kvstore.client import ClientConfig
from kvstore.errors import ConfigError, InvalidInputError, TransportError
from kvstore.eviction.cluster import BINS, Pressure, bin_of
from kvstore.identity import NO_PARENT
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb
from tests.client_support import NODES, Bench, chain


def where(bench: Bench) -> list[set[bytes]]:
    return [set(bench.transport.stored[node.address]) for node in NODES]


async def test_published_blocks_of_one_request_stay_together_and_whole():
    blocks = chain(32)
    async with Bench() as bench:
        assert bench.client.publish(blocks) == len(blocks)
        assert await bench.client.flush(5)
        assert sorted(where(bench), key=len) == [set(), {b.header.key for b in blocks}]
        everything = bench.transport.stored[NODES[0].address] | bench.transport.stored[NODES[1].address]
        assert everything == {b.header.key: b.to_bytes() for b in blocks}
        assert bench.count("publish_queue_blocks") == 0


async def test_what_a_living_node_has_is_not_sent_again():
    blocks = chain(6)
    async with Bench() as bench:
        await bench.store(blocks[:4])
        for node in NODES:
            bench.transport.stored[node.address].clear()
        bench.client.publish(blocks)
        assert await bench.client.flush(5)
        assert set.union(*where(bench)) == {b.header.key for b in blocks[4:]}


async def test_a_better_block_replaces_the_worse_copy_where_it_is():
    better = chain(4)
    async with Bench() as bench:
        await bench.store([b.truncate(1) for b in better])
        bench.client.publish(better)
        assert await bench.client.flush(5)
        for node, i in ((0, 0), (1, 1), (0, 2), (1, 3)):
            blob = bench.transport.stored[NODES[node].address][better[i].header.key]
            assert EncodedBlock.from_bytes(blob).header.present == 2


async def test_what_only_a_dead_node_had_is_published():
    blocks = chain(2)
    async with Bench() as bench:
        await bench.store(blocks)
        await bench.metadata.leave(NODES[1])
        await bench.client._membership.next_read()
        bench.client.publish(blocks)
        assert await bench.client.flush(5)
        assert blocks[1].header.key in bench.transport.stored[NODES[0].address]


@pytest.mark.parametrize("bound", [{"queue_blocks": 3}, {"queue_bytes": 3 * 2000}], ids=["blocks", "bytes"])
async def test_the_queue_is_bounded_and_sheds_the_newest(bound):
    blocks = chain(8)
    async with Bench(**bound) as bench:
        taken = bench.client.publish(blocks)
        assert taken == 3
        assert bench.count("publish_dropped", "full") == 5
        assert bench.count("publish_queue_blocks") == 3
        assert await bench.client.flush(5)
        assert set.union(*where(bench)) == {b.header.key for b in blocks[:3]}
        assert bench.client.publish(blocks[3:6]) == 3


async def test_blocks_under_way_count_against_the_bound():
    blocks = chain(8)
    async with Bench(queue_blocks=4, batch_blocks=2) as bench:
        bench.transport.put_delay_s = 0.05
        bench.client.publish(blocks[:4])
        await asyncio.sleep(0.02)
        assert bench.client.publish(blocks[4:]) == 0
        assert await bench.client.flush(5)


async def test_outcomes_are_counted():
    blocks = chain(6)
    async with Bench() as bench:
        keys = [b.header.key for b in blocks]
        outcomes = (pb.BLOCK_STATUS_RESOURCE_EXHAUSTED, pb.BLOCK_STATUS_BUSY, pb.BLOCK_STATUS_DATA_LOSS, pb.BLOCK_STATUS_ALREADY_EXISTS)
        bench.transport.status = dict(zip(keys, outcomes, strict=False))
        bench.client.publish(blocks)
        assert await bench.client.flush(5)
        assert [bench.count("publish_dropped", r) for r in ("no_room", "busy", "corrupt", "unavailable")] == [1, 1, 1, 0]
        assert bench.count("corrupt_blocks", "publish") == 1


async def test_a_failing_node_is_passed_over():
    blocks = chain(6)
    async with Bench() as bench:
        bench.transport.fail[NODES[0].address] = TransportError("gone")
        bench.client.publish(blocks)
        assert await bench.client.flush(5)
        assert where(bench)[1] == {b.header.key for b in blocks}
        assert bench.count("store_unavailable", "node") == 1


async def test_what_no_node_takes_is_given_up():
    blocks = chain(4)
    async with Bench(suspect_s=0.01) as bench:
        for node in NODES:
            bench.transport.fail[node.address] = TransportError("gone")
        bench.client.publish(blocks)
        assert await bench.client.flush(10)
        assert bench.count("publish_dropped", "unavailable") == 4


async def test_while_the_metadata_is_away_blocks_wait_and_are_written_later():
    blocks = chain(4)
    async with Bench(refresh_s=0.02) as bench:
        bench.metadata.state.away = True
        bench.client.publish(blocks)
        assert not await bench.client.flush(0.3)
        assert where(bench) == [set(), set()]
        assert await bench.client.lookup([b.header.key for b in blocks]) == []
        bench.metadata.state.away = False
        assert await bench.client.flush(5)
        assert len(set.union(*where(bench))) == 4


async def test_closing_drops_and_counts_what_is_left():
    blocks = chain(4)
    async with Bench() as bench:
        bench.metadata.state.away = True
        bench.client.publish(blocks)
        await bench.client.close(flush_s=0.05)
        assert bench.count("publish_dropped", "closed") == 4
        assert bench.client.publish(blocks) == 0
        assert bench.count("publish_dropped", "closed") == 8


async def test_closing_publishes_first_when_there_is_time():
    async with Bench() as bench:
        bench.client.publish(chain(4))
        await bench.client.close(flush_s=5)
        assert len(set.union(*where(bench))) == 4


async def test_a_block_without_a_name_is_refused():
    (block,) = chain(1)
    async with Bench() as bench:
        with pytest.raises(InvalidInputError, match="with_identity"):
            bench.client.publish([block.with_identity(NO_PARENT, NO_PARENT, NO_PARENT)])


def test_impossible_settings_are_refused():
    for setting in ({"queue_blocks": 0}, {"redis_timeout_s": 0.0}, {"streams_per_node": -1}):
        with pytest.raises(ConfigError, match=next(iter(setting))):
            ClientConfig(**setting)


async def test_a_fault_of_ours_in_one_batch_does_not_end_publishing(caplog):
    blocks = chain(4)
    async with Bench() as bench:
        bench.transport.fail[NODES[0].address] = bench.transport.fail[NODES[1].address] = ZeroDivisionError("a bug")
        bench.client.publish(blocks[:2])
        assert await bench.client.flush(5)
        assert bench.count("publish_dropped", "error") == 2
        assert "a bug" in caplog.text
        bench.transport.fail.clear()
        bench.client.publish(blocks[2:])
        assert await bench.client.flush(5)
        assert len(set.union(*where(bench))) == 2


async def test_what_follows_a_refused_block_is_not_sent():
    blocks = chain(6)
    async with Bench(batch_blocks=2) as bench:
        bench.transport.status = {blocks[3].header.key: pb.BLOCK_STATUS_RESOURCE_EXHAUSTED}
        bench.client.publish(blocks)
        assert await bench.client.flush(5)
        assert set.union(*where(bench)) == {b.header.key for b in blocks[:3]}
        assert bench.count("publish_dropped", "no_room") == 3
        bench.transport.status = {}
        bench.client.publish(blocks)
        assert await bench.client.flush(5)
        assert set.union(*where(bench)) == {b.header.key for b in blocks}, "it may be wanted later"


async def test_the_node_that_refused_a_block_hears_of_what_follows_without_its_payload():
    blocks = chain(9)
    async with Bench(batch_blocks=2) as bench:
        bench.transport.status = {blocks[3].header.key: pb.BLOCK_STATUS_RESOURCE_EXHAUSTED}
        bench.client.publish(blocks)
        assert await bench.client.flush(5)
        (first,) = [address for address, stored in bench.transport.stored.items() if stored]
        assert bench.transport.told == {first: [b.header.key for b in blocks[4:]]}
        assert bench.count("publish_dropped", "no_room") == 6
        assert bench.count("corrupt_blocks", "publish") == bench.count("publish_dropped", "corrupt") == 0


async def test_of_what_follows_a_refused_block_nobody_else_hears():
    blocks = chain(6)
    async with Bench(batch_blocks=2, suspect_s=60.0) as bench:
        bench.transport.status = {blocks[1].header.key: pb.BLOCK_STATUS_RESOURCE_EXHAUSTED}
        bench.client.publish(blocks[:2])
        assert await bench.client.flush(5)
        (first,) = [address for address, stored in bench.transport.stored.items() if stored]
        bench.transport.fail[first] = TransportError("gone")
        bench.client.publish(blocks[2:])
        assert await bench.client.flush(5)
        assert not bench.transport.told
        assert set.union(*where(bench)) == {blocks[0].header.key}
        assert bench.count("publish_dropped", "no_room") == 5


def priced(node, cheap_bytes: int, value: float, rest: float):
    """The node full, with so many bytes of `value`, all others worth `rest`."""
    by_value = [0] * BINS
    by_value[bin_of(value)] = cheap_bytes
    by_value[bin_of(rest)] += node.arena_bytes - cheap_bytes
    return replace(node, used_bytes=node.arena_bytes, pressure=Pressure(0, node.arena_bytes, by_value).to_text())


@pytest.mark.parametrize("input_tokens", [0, 64])
async def test_a_request_goes_to_one_node_in_however_many_batches_it_comes(input_tokens):
    """The first few blocks would be cheaper on one node, all of them are so on the other; there both halves of the request go."""
    blocks, size = chain(32), chain(1)[0].header.total_bytes
    async with Bench(batch_blocks=4, refresh_s=60.0) as bench:
        for node in (priced(NODES[0], 8 * size, 0.001, 1.0), priced(NODES[1], 16 * size, 0.01, 0.2)):
            await bench.metadata.heartbeat(node, 60)
        await bench.client._membership.next_read()
        bench.client.publish(blocks[:28], input_tokens=input_tokens)
        assert await bench.client.flush(5)
        if input_tokens:  # else it cannot be known that this belongs to it, and what is on the other node costs less now
            bench.client.publish(blocks[28:], input_tokens=input_tokens)
            assert await bench.client.flush(5)
        assert where(bench) == [set(), {b.header.key for b in (blocks if input_tokens else blocks[:28])}]
