"""This store, by each of its ways: the same client, node and blocks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, ClassVar, TypeVar

from kvstore.client import ClientConfig, Fetched, Hit, KvClient
from kvstore.errors import TransportError

from .base import NAMESPACE, Store, Values

DEADLINE_S = 60.0
T = TypeVar("T")


def use_gpu(device: str) -> None:
    """Be a process that works on a GPU, as a worker is: such a one reads a node's memory there."""
    import torch

    torch.zeros(1, device=device)


class Concertina(Store):
    """`KvClient` between `publish` and `flush`, and in `fetch`; every block is verified on both sides."""

    paths: ClassVar[str]

    def __init__(self, values: Values, where: dict) -> None:
        super().__init__(values, where)
        if where["device"] != "cpu":
            use_gpu(where["device"])
        self._loop = asyncio.new_event_loop()
        queue_bytes = 2 * values.total_bytes + (64 << 20)
        config = ClientConfig(redis_url=where["redis"], paths=self.paths, queue_bytes=queue_bytes, put_timeout_s=DEADLINE_S)
        self._client = KvClient(config)
        self._hits: list[Hit] = []
        self._run(self._client.start())

    def before_put(self) -> None:
        """The node keeps a block that it has: without this, nothing would be moved."""
        self._run(self._client.admin.evict(self.values.keys))
        self._wait_for(0)

    def put(self) -> None:
        self._run(self._put())

    def before_get(self) -> None:
        self._hits = self._wait_for(self.values.count)

    def get(self, **options: Any) -> Fetched:
        """As `Store.get`; `options` are further ones of `KvClient.fetch`."""
        fetched = self._run(self._client.fetch(self._hits, namespace=NAMESPACE, deadline_s=DEADLINE_S, **options))
        if len(fetched.blocks) != self.values.count:
            raise TransportError(f"only {len(fetched.blocks)} of {self.values.count} blocks came")
        return fetched

    def close(self) -> None:
        self._run(self._client.admin.evict(self.values.keys))
        self._run(self._client.close())
        self._loop.close()

    async def _put(self) -> None:
        taken = self._client.publish(self.values.blocks)
        if taken != self.values.count or not await self._client.flush(DEADLINE_S):
            raise TransportError("the node did not take all blocks")

    def _wait_for(self, count: int) -> list[Hit]:
        """Until the index names so many of the blocks."""
        until = time.monotonic() + DEADLINE_S
        while len(hits := self._run(self._client.lookup(self.values.keys))) != count:
            if time.monotonic() > until:
                raise TransportError(f"the index names {len(hits)} blocks, not {count}")
            time.sleep(0.02)
        return hits

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(work)


class ByGrpc(Concertina):
    """Over gRPC alone."""

    paths = ""


class ByTcp(Concertina):
    """Through the node's door, over TCP."""

    paths = "tcp"


class OnSameHost(Concertina):
    """Through the node's door: gets out of its shared memory, puts through memory that it shares with the writer."""

    paths = "local"
