"""Evict: drop named blocks."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.credentials import Caller
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from ..plans import check_keys
from ..status import Status
from .base import UnaryHandler


class Evict(UnaryHandler):
    """See the module."""

    request_type = pb.EvictRequest

    async def answer(self, request: pb.EvictRequest, caller: Caller) -> pb.EvictResponse:
        engine, service = self.service.engine, self.service
        if not caller.admin or not caller.tenant:
            return pb.EvictResponse(statuses=engine.evict(service.ids(caller, request.keys)))
        check_keys(request.keys)
        return pb.EvictResponse(statuses=[_worst(engine.evict(service.every_id(key))) for key in request.keys])


def _worst(statuses: Sequence[Status]) -> Status:
    """Of the copies of several owners the one that stays counts."""
    return max(statuses, default=Status.NOT_FOUND, key=lambda status: status is not Status.OK)
