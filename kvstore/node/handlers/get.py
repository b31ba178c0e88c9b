"""Get: blocks out of the arena, in frames.

The blocks are held by a lease while they stream, for a bounded time. After each copy the block's generation is compared: a reader
slower than the lease may lose a block, which its frame says (DATA_LOSS once its header is out), but never gets another block's bytes.
"""

from __future__ import annotations

import grpc

from kvstore.block import SECTIONS
from kvstore.errors import InvalidInputError
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from ..config import FRAME_BYTES
from ..engine import Found
from ..status import Status
from ..wire import get_frame, pack, windows
from .base import Handler

#: Where the caller reads packed frames, a message is filled up to here. Below and above, gRPC moves fewer bytes a second.
PACK_BYTES = 2 << 20


class Get(Handler):
    """One request, a stream of frames."""

    request_type = pb.GetRequest
    register = staticmethod(grpc.unary_stream_rpc_method_handler)

    @property
    def timeout_s(self) -> float:
        return self.service.engine.config.get_timeout_s

    async def call(self, request: bytes, context: grpc.aio.ServicerContext) -> None:
        asked = self.parse(request)
        if asked.section > SECTIONS:
            raise InvalidInputError(f"section {asked.section} of a block; there are at most {SECTIONS}, and 0 asks for whole blocks")
        engine = self.service.engine
        ids = self.service.ids(self.service.caller(context), asked.keys)
        use = engine.reading(ids, asked.input_tokens) if asked.section <= 1 else None  # further sections are the same use
        entries = engine.find(ids)
        plan = [entry and Found.of(entry, asked.max_fidelity) for entry in entries]
        lease = engine.lease(entries)
        outgoing = Outgoing(context, PACK_BYTES if asked.pack else 0)
        try:
            for index, found in enumerate(plan):
                await self._send(index, ids[index], found, asked, outgoing)
            await outgoing.flush()
        finally:
            if use is not None:
                engine.used(entries, use)
            engine.holds.release(lease)

    async def _send(self, index: int, id: bytes, found: Found | None, asked: pb.GetRequest, outgoing: Outgoing) -> None:
        """One block: the best copy that the node has, and NOT_FOUND where it has none."""
        resident = found is not None and self.service.engine.intact(found)
        best = resident and not self.service.spill.has_better(id, found.header, asked.max_fidelity)
        if not best and await self._send_spilled(index, id, asked, outgoing):
            return
        if found is not None:
            await self._send_resident(index, found, asked.section, outgoing)
        else:
            await outgoing.send(get_frame(index, Status.NOT_FOUND))

    async def _send_resident(self, index: int, found: Found, section: int, outgoing: Outgoing) -> None:
        header = found.header.to_bytes()
        begin, end = found.header.section(section - 1) if section else (0, found.header.payload_bytes)
        if begin == end:
            await outgoing.send(get_frame(index, Status.OK, header))
        for offset in range(begin, end, FRAME_BYTES):
            pieces: list = []
            if self.service.engine.intact(found):
                pieces = await self.service.copier.read(found.header, found.layers, offset, min(FRAME_BYTES, end - offset))
            if not pieces or not self.service.engine.intact(found):
                await outgoing.send(get_frame(index, Status.DATA_LOSS if offset > begin else Status.NOT_FOUND))
                return
            await outgoing.send(get_frame(index, Status.OK, header, pieces))
            header = b""

    async def _send_spilled(self, index: int, id: bytes, asked: pb.GetRequest, outgoing: Outgoing) -> bool:
        """A block from a tier behind the arena, and back into it. Returns whether there was one."""
        async with self.service.spill.reading(id) as block:
            if block is None:
                return False
            part = block.truncate(asked.max_fidelity) if 0 < asked.max_fidelity < block.header.present else block
            header, payload = part.header.to_bytes(), part.section(asked.section - 1) if asked.section else part.payload
            if not sum(map(len, payload)):
                await outgoing.send(get_frame(index, Status.OK, header))
            for pieces in windows(payload, FRAME_BYTES):
                await outgoing.send(get_frame(index, Status.OK, header, pieces))
                header = b""
            await self.service.promote_read(id, block)
            return True


class Outgoing:
    """The frames of one Get stream on their way out; small ones wait for each other until they make a message.

    Parameters
    ----------
    context : ServicerContext
    pack_bytes : int
        Bytes from which on a message is sent; 0 sends each frame alone.
    """

    def __init__(self, context: grpc.aio.ServicerContext, pack_bytes: int) -> None:
        self._context = context
        self._pack_bytes = pack_bytes
        self._frames: list[bytes] = []
        self._size = 0

    async def send(self, frame: bytes) -> None:
        """Send a frame, perhaps later."""
        if self._size + len(frame) > self._pack_bytes:
            await self.flush()
        self._frames.append(frame)
        self._size += len(frame)
        if self._size >= self._pack_bytes:
            await self.flush()

    async def flush(self) -> None:
        """Send what waits."""
        if self._frames:
            frames, self._frames, self._size = self._frames, [], 0
            await self._context.write(pack(frames))
