"""Second copies: from a busy node to an idle one, once a block, within an allowance; sent on as they came."""

from __future__ import annotations

from dataclasses import replace

from kvstore.client.copies import BUSY_READERS, HotCopies
from kvstore.client.lookup import Hit
from kvstore.clock import ManualClock
from tests.client_support import NAMESPACE, NODES, Bench, chain


def hits_of(blocks, node=NODES[0], copies=1):
    return [Hit(block.header.key, node, block.header.total_bytes, 2, copies) for block in blocks]


def nodes(*readers: float):
    return {node.incarnation: replace(node, readers=count) for node, count in zip(NODES, readers, strict=True)}


def test_nothing_is_copied_while_nobody_is_busy():
    blocks = chain(3)
    copies = HotCopies(ManualClock(), 10**6)
    assert copies.choose(hits_of(blocks), blocks, nodes(BUSY_READERS - 1, 0.0)) is None
    assert copies.choose(hits_of(blocks), blocks, nodes(BUSY_READERS, BUSY_READERS)) is None, "the other is no better off"
    assert copies.choose(hits_of(blocks), [], nodes(BUSY_READERS, 0.0)) is None


def test_what_came_from_the_busy_node_goes_to_the_idle_one_once():
    blocks = chain(4)
    copies = HotCopies(ManualClock(), 10**6)
    assert copies.choose(hits_of(blocks), blocks[:3], nodes(BUSY_READERS, 1.0)) == (NODES[1].incarnation, blocks[:3])
    assert copies.choose(hits_of(blocks, copies=2), blocks, nodes(BUSY_READERS, 1.0)) is None
    assert copies.choose(hits_of(blocks, NODES[1]), blocks, nodes(BUSY_READERS, 1.0)) is None


def test_an_allowance_bounds_what_is_copied():
    blocks, clock = chain(8), ManualClock()
    size = blocks[0].header.total_bytes
    copies = HotCopies(clock, 3 * size)
    assert copies.choose(hits_of(blocks), blocks, nodes(BUSY_READERS, 0.0))[1] == blocks[:3]
    assert copies.choose(hits_of(blocks), blocks, nodes(BUSY_READERS, 0.0)) is None
    clock.advance(0.7)
    assert copies.choose(hits_of(blocks), blocks, nodes(BUSY_READERS, 0.0))[1] == blocks[:2]
    clock.advance(60.0)
    assert copies.choose(hits_of(blocks), blocks, nodes(BUSY_READERS, 0.0))[1] == blocks[:3], "no more than a second is saved up"


async def test_a_fetch_from_a_busy_node_leaves_a_copy_of_the_same_bytes_on_the_other():
    blocks = chain(5)
    async with Bench() as bench:
        keys = await bench.store(blocks)
        await bench.metadata.heartbeat(replace(NODES[0], readers=2 * BUSY_READERS), 60)
        await bench.client._membership.next_read()
        fetched = await bench.fetch(keys, namespace=NAMESPACE)
        assert len(fetched.blocks) == 5
        assert await bench.client.flush(5)
        copied = bench.transport.stored[NODES[1].address]
        assert [copied[key] for key in keys] == [block.to_bytes() for block in blocks]
        assert set(bench.transport.stored[NODES[0].address]) == set(keys[::2]), "nothing goes the other way"
