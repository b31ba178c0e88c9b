"""From a tier back into the arena."""

from __future__ import annotations

from kvstore.arena import Arena
from kvstore.block import EncodedBlock
from kvstore.eviction.base import Request

from ..copier import BlockWriter, Copier
from ..engine import NodeEngine
from ..status import Status


async def promote(engine: NodeEngine, arena: Arena, copier: Copier, block: EncodedBlock, owner: str, request: Request) -> Status:
    """Put a verified block of `owner` into the arena, as a Put does: room is made by the policy, and every layer is checked again.

    Returns
    -------
    Status
        OK, or why it was not wanted: the tier still has it.
    """
    decision = engine.reserve(block.header, request, owner)
    if isinstance(decision, Status):
        return decision
    writer = BlockWriter(block.header, decision.layers, arena)
    try:
        for part in block.payload:
            await copier.write(writer, memoryview(part))
    except BaseException:
        engine.abort(decision)
        raise
    return engine.commit(decision)
