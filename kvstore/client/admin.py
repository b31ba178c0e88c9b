"""Looking after the store: what the commands ``status`` and ``blocks`` do, over all living nodes at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from kvstore.errors import DeadlineError, NotFoundError, TransportError
from kvstore.metadata import NodeRecord
from kvstore.metadata.subjects import FLOORS, QUOTAS
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from .membership import Membership
from .transport import Transport

log = logging.getLogger(__name__)

OK, NOT_FOUND = pb.BLOCK_STATUS_OK, pb.BLOCK_STATUS_NOT_FOUND


class Admin:
    """Administrative calls. They raise `ConcertinaError`s, unlike the data path: whoever looks after the store must see failures.

    Statuses are the names of google.rpc codes, such as ``OK``, ``NOT_FOUND`` or ``BUSY``.
    """

    def __init__(self, transport: Transport, membership: Membership, timeout_s: float) -> None:
        self._transport = transport
        self._membership = membership
        self._timeout_s = timeout_s

    def nodes(self) -> list[NodeRecord]:
        """The living nodes, by id."""
        return sorted(self._membership.everyone().values(), key=lambda record: record.id)

    def node(self, name: str) -> NodeRecord:
        """The living node of this id, incarnation or address. Raises NotFoundError."""
        for record in self.nodes():
            if name in (record.id, record.incarnation, record.address):
                return record
        raise NotFoundError(f"no living node {name!r}; there are: {', '.join(r.id for r in self.nodes()) or 'none'}")

    async def stats(self, node: NodeRecord) -> pb.StatsResponse:
        """The node's exact account of its memory."""
        return await self._call(node, "Stats", pb.StatsRequest())

    async def list(self, node: NodeRecord, after: bytes = b"", limit: int = 0) -> pb.ListResponse:
        """One page of the node's blocks; ``next`` of the answer is `after` of the next page, empty at the end."""
        return await self._call(node, "List", pb.ListRequest(after=after, limit=limit))

    async def evict(self, keys: Sequence[bytes]) -> list[str]:
        """Drop blocks wherever they are, unless pinned or leased. One status for each key."""
        return await self._by_key("Evict", keys, pb.EvictRequest(keys=keys))

    async def clear(self, namespace: bytes | None = None) -> tuple[int, int]:
        """Drop all blocks, or those of one namespace, that are neither pinned nor leased. Returns blocks and arena bytes freed."""
        answers = await self._everywhere("Clear", pb.ClearRequest(namespace=namespace or b""))
        return sum(a.blocks for a in answers), sum(a.freed_bytes for a in answers)

    async def pin(self, keys: Sequence[bytes], ttl_seconds: int) -> list[str]:
        """Keep blocks from eviction and demotion for a bounded time. One status for each key."""
        return await self._by_key("Pin", keys, pb.PinRequest(keys=keys, ttl_seconds=ttl_seconds))

    async def unpin(self, keys: Sequence[bytes]) -> list[str]:
        """End pins early. One status for each key."""
        return await self._by_key("Unpin", keys, pb.UnpinRequest(keys=keys))

    async def quotas(self) -> dict[str, int]:
        """Bytes that each tenant, or namespace, with a quota may hold in the whole cluster."""
        return await QUOTAS.read(self._membership.require())

    async def set_quota(self, subject: str, size_bytes: int | None) -> dict[str, int]:
        """Set a quota, or with None lift it; nodes heed it within a second. Answers all quotas."""
        return await QUOTAS.set(self._membership.require(), subject, size_bytes)

    async def floors(self) -> dict[str, float]:
        """Relative error that the ladder may give the blocks of each tenant, or namespace, with a floor."""
        return await FLOORS.read(self._membership.require())

    async def set_floor(self, subject: str, max_distortion: float | None) -> dict[str, float]:
        """Set a floor, or with None lift it; nodes heed it within a second. Answers all floors."""
        return await FLOORS.set(self._membership.require(), subject, max_distortion)

    async def _by_key(self, rpc: str, keys: Sequence[bytes], request: Any) -> list[str]:
        """Ask every node. Of a key's answers OK counts most, then why it failed where it is, NOT_FOUND least."""
        answers = await self._everywhere(rpc, request)
        merged = [NOT_FOUND] * len(keys)
        for answer in answers:
            for i, status in enumerate(answer.statuses[: len(keys)]):
                if merged[i] != OK and status != NOT_FOUND:
                    merged[i] = status
        return [pb.BlockStatus.Name(status).removeprefix("BLOCK_STATUS_") for status in merged]

    async def _everywhere(self, rpc: str, request: Any) -> list[Any]:
        """The answers of all nodes that can be reached; one that has just died holds nothing any more. Raises if none can be."""
        nodes = self.nodes()
        answers = await asyncio.gather(*(self._call(node, rpc, request) for node in nodes), return_exceptions=True)
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        for failure in failures:
            if not isinstance(failure, (TransportError, DeadlineError)) or len(failures) == len(nodes):
                raise failure
            log.warning("%s went on without a node that does not answer: %s", rpc.lower(), failure)
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def _call(self, node: NodeRecord, rpc: str, request: Any) -> Any:
        return await self._transport.call(node.address, rpc, request, self._timeout_s)
