"""Evict: drop named blocks."""

from __future__ import annotations

from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from .base import UnaryHandler


class Evict(UnaryHandler):
    """See the module."""

    request_type = pb.EvictRequest

    async def answer(self, request: pb.EvictRequest) -> pb.EvictResponse:
        return pb.EvictResponse(statuses=self.service.engine.evict(request.keys))
