"""Get: blocks out of the arena, in frames.

The blocks are held by a lease while they stream, for a bounded time. After each copy the block's generation is compared: a reader
slower than the lease may lose a block, which its frame says (DATA_LOSS once its header is out), but never gets another block's bytes.
"""

from __future__ import annotations

import grpc

from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from ..config import FRAME_BYTES
from ..engine import Found
from ..status import Status
from ..wire import get_frame, pack
from .base import Handler

#: Where the caller reads packed frames, a message is filled up to here.
PACK_BYTES = 1 << 20


class Get(Handler):
    """One request, a stream of frames."""

    request_type = pb.GetRequest
    register = staticmethod(grpc.unary_stream_rpc_method_handler)

    @property
    def timeout_s(self) -> float:
        return self.service.engine.config.get_timeout_s

    async def call(self, request: bytes, context: grpc.aio.ServicerContext) -> None:
        asked = self.parse(request)
        engine = self.service.engine
        plan, lease = engine.plan_get(asked.keys, asked.max_fidelity, engine.request(asked.input_tokens))
        outgoing = Outgoing(context, PACK_BYTES if asked.pack else 0)
        try:
            for index, found in enumerate(plan):
                if found is None or not engine.intact(found):
                    await outgoing.send(get_frame(index, Status.NOT_FOUND))
                else:
                    await self._send(index, found, outgoing)
            await outgoing.flush()
        finally:
            engine.release(lease)

    async def _send(self, index: int, found: Found, outgoing: Outgoing) -> None:
        header = found.header.to_bytes()
        size = found.header.payload_bytes
        for offset in range(0, size, FRAME_BYTES):
            pieces: list = []
            if self.service.engine.intact(found):
                pieces = await self.service.copier.read(found.header, found.layers, offset, min(FRAME_BYTES, size - offset))
            if not pieces or not self.service.engine.intact(found):
                await outgoing.send(get_frame(index, Status.DATA_LOSS if offset else Status.NOT_FOUND))
                return
            await outgoing.send(get_frame(index, Status.OK, header, pieces))
            header = b""


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
