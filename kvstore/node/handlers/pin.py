"""Pin: keep blocks from eviction and demotion for a while."""

from __future__ import annotations

from kvstore.credentials import Caller
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from .base import UnaryHandler


class Pin(UnaryHandler):
    """See the module."""

    request_type = pb.PinRequest

    async def answer(self, request: pb.PinRequest, caller: Caller) -> pb.PinResponse:
        ids = self.service.ids(caller, request.keys)
        await self.service.promote(ids)
        return pb.PinResponse(statuses=self.service.engine.holds.pin(ids, request.ttl_seconds))
