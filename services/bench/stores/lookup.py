"""How long a client takes to find the cached part of a prompt in an index of many blocks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import numpy as np

from kvstore.arena import settle_objects
from kvstore.client import ClientConfig, KvClient
from kvstore.errors import TransportError
from kvstore.identity import block_keys
from kvstore.metadata import IndexEntry, NodeRecord
from kvstore.metadata.redis import RedisMetadata
from kvstore.metadata.resp import pack

from .base import NAMESPACE

_TTL_S = 3600.0
_NODES = [NodeRecord(f"index-{i}", f"{i + 1:016x}", f"127.0.0.1:{i + 1}") for i in range(2)]
_BATCH = 20_000


def measure(redis_url: str, index_blocks: int, lengths: Sequence[int], calls: int) -> dict[str, list[float]]:
    """Seconds of each lookup, by ``lookup_<blocks>_s``, and of a bare round trip to Redis, ``redis_ping_s``, in turns.

    Parameters
    ----------
    index_blocks : int
        Blocks that the index holds, those looked up among them.
    lengths : sequence of int
        Blocks of a prompt, all cached; each lookup is of another prompt.
    """
    return asyncio.run(_measure(redis_url, index_blocks, lengths, calls))


async def _measure(redis_url: str, index_blocks: int, lengths: Sequence[int], calls: int) -> dict[str, list[float]]:
    metadata = RedisMetadata(redis_url, "lookup", timeout_s=5.0)
    client = KvClient(ClientConfig(redis_url=redis_url, prefix="lookup"))
    try:
        for node in _NODES:
            await metadata.heartbeat(node, _TTL_S)
        keys = await _fill(metadata, index_blocks, max(lengths))
        await client.start()
        settle_objects()  # as workers do
        samples: dict[str, list[float]] = {f"lookup_{length}_s": [] for length in lengths} | {"redis_ping_s": []}
        rng = np.random.default_rng(0)
        for number in range(-1, calls):
            prompt = keys[rng.integers(len(keys))]
            for length in lengths:
                began = time.perf_counter()
                hits = await client.lookup(prompt[:length], deadline_s=5.0)
                seconds = time.perf_counter() - began
                if len(hits) != length:
                    raise TransportError(f"a lookup found {len(hits)} of {length} blocks")
                samples[f"lookup_{length}_s"] += [seconds] * (number >= 0)
            began = time.perf_counter()
            await metadata.shards.run([pack("PING")], [])
            samples["redis_ping_s"] += [time.perf_counter() - began] * (number >= 0)
        return samples
    finally:
        await client.close()
        await metadata.close()


async def _fill(metadata: RedisMetadata, index_blocks: int, chain_blocks: int) -> list[list[bytes]]:
    """Announce `index_blocks` in chains, each on one of the nodes in turn. Returns the keys of whole chains."""
    chains: list[list[bytes]] = []
    waiting: dict[str, list[IndexEntry]] = {node.incarnation: [] for node in _NODES}
    left = index_blocks
    while left:
        chain = block_keys(NAMESPACE, np.arange(min(left, chain_blocks)) + (len(chains) << 32 >> 12), 1)
        own = _NODES[len(chains) % len(_NODES)].incarnation
        waiting[own] += [IndexEntry(key, 737_280 + len(chains) % 512, 1) for key in chain]
        left -= len(chain)
        chains.append(chain)
        if len(waiting[own]) >= _BATCH or not left:
            for incarnation, entries in waiting.items():
                await metadata.announce(incarnation, entries)
                entries.clear()
    return [chain for chain in chains if len(chain) == chain_blocks]
