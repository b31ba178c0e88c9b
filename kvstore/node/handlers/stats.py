"""Stats: the node's exact account of its memory."""

from __future__ import annotations

from kvstore.credentials import Caller
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from .base import UnaryHandler


class Stats(UnaryHandler):
    """See the module."""

    request_type = pb.StatsRequest

    async def answer(self, request: pb.StatsRequest, caller: Caller) -> pb.StatsResponse:
        caller.require_admin("Stats, which tells of everybody's blocks,")
        engine, record, spill = self.service.engine, self.service.record, self.service.spill
        engine.holds.expire()
        return pb.StatsResponse(
            node=record.id,
            incarnation=record.incarnation,
            device=record.device,
            arena_bytes=engine.arena_bytes,
            used_bytes=engine.used_bytes,
            free_bytes=engine.free_bytes,
            reserved_bytes=engine.reserved_bytes,
            blocks=len(engine.table),
            raw_bytes=engine.table.raw_bytes,
            stored_bytes=engine.table.stored_by_codec.total(),
            evictions=engine.tally.evictions.total(),
            demotions=engine.tally.demotions.total(),
            leases=len(engine.holds.leases),
            pinned=len(engine.holds.pins),
            page_bytes=engine.config.page_bytes,
            spill_bytes=sum(level.capacity_bytes for level in spill.levels),
            spill_used_bytes=sum(level.used_bytes for level in spill.levels),
            spilled_blocks=len(spill),
        )
