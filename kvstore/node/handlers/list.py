"""List: pages through the resident blocks in the order of their ids: of their keys, where no credentials are asked for."""

from __future__ import annotations

from kvstore.credentials import Caller
from kvstore.errors import InvalidInputError
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from .base import UnaryHandler, summary

DEFAULT_LIMIT, MAX_LIMIT = 1000, 10_000


class List(UnaryHandler):
    """See the module."""

    request_type = pb.ListRequest

    async def answer(self, request: pb.ListRequest, caller: Caller) -> pb.ListResponse:
        if request.limit > MAX_LIMIT:
            raise InvalidInputError(f"limit is at most {MAX_LIMIT}, not {request.limit}")
        limit = request.limit or DEFAULT_LIMIT
        engine = self.service.engine
        now = engine.clock.now()
        entries = engine.table.page(request.after, limit + 1, None if caller.admin else caller.tenant)
        following = entries[limit - 1].id if len(entries) > limit else b""
        return pb.ListResponse(blocks=[summary(e, now, e.id in engine.holds.pins) for e in entries[:limit]], next=following)
