"""A look at the store nodes of the demo: their own exact account, by their own RPC."""

from __future__ import annotations

import time
from dataclasses import dataclass

from kvstore.errors import TransportError
from kvstore.metadata import NodeRecord
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb
from protos.concertina.kvstore.v1 import kvstore_pb2_grpc as rpc
from services.system.members import members
from services.system.wire import channel

TIMEOUT_S = 10.0
SETTLE_S = 0.4


@dataclass(frozen=True, slots=True)
class NodeState:
    """One node's account; bytes."""

    id: str
    pid: int
    arena_bytes: int
    used_bytes: int
    blocks: int
    evictions: int


class Store:
    """The nodes that Redis names at `redis`."""

    def __init__(self, redis: str) -> None:
        self._redis = redis

    def nodes(self) -> list[NodeState]:
        """The living nodes' accounts."""
        return [self._state(record) for record in members(self._redis)[0]]

    def last_used(self) -> NodeState:
        """The node that served or took a block most recently."""
        idle_s = {}
        for record in members(self._redis)[0]:
            with channel(record.address) as opened:
                blocks = rpc.KVStoreServiceStub(opened).List(pb.ListRequest(limit=10_000), timeout=TIMEOUT_S).blocks
            idle_s[record.id] = min((block.idle_seconds for block in blocks), default=float("inf"))
        return min(self.nodes(), key=lambda node: idle_s.get(node.id, float("inf")))

    def settled(self, timeout_s: float = 30.0) -> list[NodeState]:
        """The accounts once publishing, which runs behind the answers, has come to rest. Raises TransportError if it does not."""
        deadline = time.monotonic() + timeout_s
        before, since = None, time.monotonic()
        while time.monotonic() < deadline:
            now = self.nodes()
            if now != before:
                before, since = now, time.monotonic()
            elif time.monotonic() - since > SETTLE_S * 2 and any(node.blocks for node in now):
                return now
            time.sleep(SETTLE_S / 2)
        raise TransportError(f"the store did not come to rest within {timeout_s:.0f} s")

    @staticmethod
    def _state(record: NodeRecord) -> NodeState:
        with channel(record.address) as opened:
            stats = rpc.KVStoreServiceStub(opened).Stats(pb.StatsRequest(), timeout=TIMEOUT_S)
        return NodeState(record.id, record.pid, stats.arena_bytes, stats.used_bytes, stats.blocks, stats.evictions)
