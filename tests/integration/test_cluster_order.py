"""Two real nodes: what they publish, a quota over both, pins, and a node that joins."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from kvstore.eviction.cluster import Pressure
from services.bench.live import LiveStore, Maker, Shape, valkey

PAGE, BLOCKS = 512, 64


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LiveStore]:
    redis = valkey(tmp_path)
    try:
        async with LiveStore(redis, "order", nodes=2, arena_bytes=BLOCKS * PAGE, page_bytes=PAGE, policy="value") as started:
            yield started
    finally:
        redis.stop()


async def put(store: LiveStore, maker: Maker, numbers: range) -> None:
    """Each block is a prompt of its own."""
    for number in numbers:
        store.client.publish([maker.block(number)], input_tokens=512)
    assert await store.client.flush(20.0)


async def until(true: Callable[[], bool], timeout_s: float = 15.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not true():
            await asyncio.sleep(0.1)


async def held(store: LiveStore, maker: Maker) -> set[bytes]:
    pages = [await store.client.admin.list(node) for node in store.client.nodes()]
    return {block.key for page in pages for block in page.blocks if block.namespace == maker.namespace}


async def test_reports_pins_and_quotas_hold_over_all_nodes(store: LiveStore) -> None:
    alice, bob = Maker("alice", Shape((PAGE,), (0.0,))), Maker("bob", Shape((PAGE,), (0.0,)))
    for start in range(0, 4 * BLOCKS, BLOCKS):
        await put(store, alice, range(start, start + BLOCKS))
        await asyncio.sleep(0.6)
    await until(lambda: all(node.used_bytes == BLOCKS * PAGE for node in store.client.nodes()))
    for node in store.client.nodes():
        report = Pressure.from_text(node.pressure, 0, 0)
        assert (report.free_bytes, sum(report.bytes_by_value)) == (0, BLOCKS * PAGE), "both nodes are full, and say of what"

    pinned = sorted(await held(store, alice))[:8]
    assert await store.client.admin.pin(pinned, 60) == ["OK"] * 8
    await store.client.admin.set_quota(bob.namespace.hex(), 16 * PAGE)
    await asyncio.sleep(1.5)  # nodes read quotas with each heartbeat
    for start in range(0, 96, 8):
        await put(store, bob, range(start, start + 8))
        await asyncio.sleep(0.6)  # a node counts what the other held at its last heartbeat
    assert len(await held(store, bob)) <= 16 + 8, "at most what came between two heartbeats is over the quota"
    assert len(await held(store, alice)) >= 2 * BLOCKS - 16 - 8, "nobody else's blocks go for a tenant that is over its quota"
    assert set(pinned) <= await held(store, alice)
    assert await store.client.admin.unpin(pinned) == ["OK"] * 8
