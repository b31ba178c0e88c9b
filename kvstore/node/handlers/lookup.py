"""Lookup: which of the asked blocks are here, and a lease on them if wanted."""

from __future__ import annotations

from kvstore.credentials import Caller
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from ..status import Status
from .base import UnaryHandler, summary


class Lookup(UnaryHandler):
    """See the module."""

    request_type = pb.LookupRequest

    async def answer(self, request: pb.LookupRequest, caller: Caller) -> pb.LookupResponse:
        engine = self.service.engine
        entries, lease = engine.lookup(self.service.ids(caller, request.keys), request.lease_ms / 1000)
        now = engine.clock.now()
        blocks = [
            pb.BlockSummary(key=key, status=Status.NOT_FOUND) if entry is None else summary(entry, now, entry.id in engine.holds.pins)
            for key, entry in zip(request.keys, entries, strict=True)
        ]
        return pb.LookupResponse(blocks=blocks, lease_id=lease, incarnation=self.service.record.incarnation)
