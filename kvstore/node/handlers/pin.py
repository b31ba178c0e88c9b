"""Pin: keep blocks from eviction and demotion for a while."""

from __future__ import annotations

from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from .base import UnaryHandler


class Pin(UnaryHandler):
    """See the module."""

    request_type = pb.PinRequest

    async def answer(self, request: pb.PinRequest) -> pb.PinResponse:
        return pb.PinResponse(statuses=self.service.engine.pin(request.keys, request.ttl_seconds))
