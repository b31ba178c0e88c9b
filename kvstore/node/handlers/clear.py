"""Clear: drop all blocks of a namespace, or all, but those that are held."""

from __future__ import annotations

import asyncio

from kvstore.errors import InvalidInputError
from kvstore.identity import DIGEST_BYTES
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from .base import UnaryHandler

#: Blocks dropped before other calls get their turn.
SLICE_BLOCKS = 1000


class Clear(UnaryHandler):
    """See the module."""

    request_type = pb.ClearRequest

    async def answer(self, request: pb.ClearRequest) -> pb.ClearResponse:
        if len(request.namespace) not in (0, DIGEST_BYTES):
            raise InvalidInputError(f"namespace must be {DIGEST_BYTES} bytes, or empty for all")
        engine = self.service.engine
        keys = [e.key for e in engine.table if not request.namespace or e.header.namespace == request.namespace]
        blocks = freed = 0
        for at in range(0, len(keys), SLICE_BLOCKS):
            used, count = engine.used_bytes, len(engine.table)
            engine.evict(keys[at : at + SLICE_BLOCKS], reason="clear")
            blocks += count - len(engine.table)
            freed += used - engine.used_bytes
            await asyncio.sleep(0)
        return pb.ClearResponse(blocks=blocks, freed_bytes=freed)
