"""Administrative calls over several nodes: how answers are merged, and what a node that does not answer does."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.errors import InvalidInputError, TransportError
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb
from tests.client_support import NODES, Bench

KEYS = [bytes([i]) * 32 for i in range(3)]


def answering(bench: Bench, by_node: dict[str, object]) -> None:
    """Have each node answer every call with its entry: a message, or an error to raise."""

    async def call(address, rpc, request, timeout_s):
        answer = by_node[address]
        if isinstance(answer, Exception):
            raise answer
        return answer

    bench.transport.call = call


async def test_of_a_keys_answers_ok_counts_most_and_not_found_least():
    async with Bench() as bench:
        ok, gone, busy = pb.BLOCK_STATUS_OK, pb.BLOCK_STATUS_NOT_FOUND, pb.BLOCK_STATUS_BUSY
        first, second = pb.EvictResponse(statuses=[ok, gone, gone]), pb.EvictResponse(statuses=[busy, busy, gone])
        answering(bench, {NODES[0].address: first, NODES[1].address: second})
        assert await bench.client.admin.evict(KEYS) == ["OK", "BUSY", "NOT_FOUND"]


async def test_a_dead_node_is_passed_over_unless_it_is_the_only_one():
    async with Bench() as bench:
        answering(bench, {NODES[0].address: pb.ClearResponse(blocks=3, freed_bytes=9), NODES[1].address: TransportError("gone")})
        assert await bench.client.admin.clear() == (3, 9)
        answering(bench, {node.address: TransportError("gone") for node in NODES})
        with pytest.raises(TransportError):
            await bench.client.admin.clear()


async def test_what_the_caller_did_wrong_is_raised():
    async with Bench() as bench:
        answering(bench, {NODES[0].address: pb.PinResponse(statuses=[1]), NODES[1].address: InvalidInputError("ttl_seconds")})
        with pytest.raises(InvalidInputError, match="ttl"):
            await bench.client.admin.pin(KEYS[:1], 0)


async def test_channels_outlive_a_moment_in_which_redis_knows_no_node():
    async with Bench(refresh_s=0.01) as bench:
        kept = []

        async def keep(addresses):
            kept.append(addresses)

        bench.client._membership._changed = keep
        bench.metadata.state.lose()
        await bench.client._membership.next_read()
        await asyncio.sleep(0.05)
        assert bench.client.nodes() == []
        assert kept[-1] == {node.address for node in NODES}
