"""Clear: drop all blocks of a namespace, or all, but those that are held; of the caller alone, unless an admin."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from kvstore.credentials import Caller
from kvstore.errors import InvalidInputError
from kvstore.identity import DIGEST_BYTES
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from ..status import Status
from .base import UnaryHandler

#: Blocks dropped before other calls get their turn.
SLICE_BLOCKS = 1000


class Clear(UnaryHandler):
    """See the module."""

    request_type = pb.ClearRequest

    async def answer(self, request: pb.ClearRequest, caller: Caller) -> pb.ClearResponse:
        if len(request.namespace) not in (0, DIGEST_BYTES):
            raise InvalidInputError(f"namespace must be {DIGEST_BYTES} bytes, or empty for all")
        engine = self.service.engine
        ids = list(dict.fromkeys(id for id, owner, namespace in self._blocks() if self._meant(request, caller, owner, namespace)))
        blocks = freed = 0
        for at in range(0, len(ids), SLICE_BLOCKS):
            used = engine.used_bytes
            blocks += engine.evict(ids[at : at + SLICE_BLOCKS], reason="clear").count(Status.OK)
            freed += used - engine.used_bytes
            await asyncio.sleep(0)
        return pb.ClearResponse(blocks=blocks, freed_bytes=freed)

    def _blocks(self) -> Iterator[tuple[bytes, str, bytes]]:
        """Id, owner and namespace of each block, resident ones first."""
        for entry in self.service.engine.table:
            yield entry.id, entry.owner, entry.header.namespace
        for id, spilled in self.service.spill:
            yield id, spilled.owner, spilled.namespace

    def _meant(self, request: pb.ClearRequest, caller: Caller, owner: str, namespace: bytes) -> bool:
        return (caller.admin or owner == caller.tenant) and request.namespace in (b"", namespace)
