"""Unpin: end pins early."""

from __future__ import annotations

from kvstore.credentials import Caller
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from .base import UnaryHandler


class Unpin(UnaryHandler):
    """See the module."""

    request_type = pb.UnpinRequest

    async def answer(self, request: pb.UnpinRequest, caller: Caller) -> pb.UnpinResponse:
        return pb.UnpinResponse(statuses=self.service.engine.holds.unpin(self.service.ids(caller, request.keys)))
