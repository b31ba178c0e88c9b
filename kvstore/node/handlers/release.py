"""Release: end a lease early."""

from __future__ import annotations

from kvstore.credentials import Caller
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from .base import UnaryHandler


class Release(UnaryHandler):
    """See the module."""

    request_type = pb.ReleaseRequest

    async def answer(self, request: pb.ReleaseRequest, caller: Caller) -> pb.ReleaseResponse:
        self.service.engine.holds.release(request.lease_id)
        return pb.ReleaseResponse()
