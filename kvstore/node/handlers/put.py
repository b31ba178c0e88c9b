"""Put: blocks into the arena, in two phases: pages are reserved and written, and only a verified block is made visible."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc

from kvstore.block import BlockHeader, Distortion
from kvstore.errors import CorruptBlockError, InvalidInputError, TransportError
from kvstore.eviction.base import Request
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from ..config import MAX_FRAME_BYTES, MAX_KEYS
from ..copier import BlockWriter
from ..engine import Reservation
from ..status import Status
from ..table import block_id
from ..wire import PutFrame, parse_put
from .base import Handler, Service

#: Whole blocks that wait to be committed together.
MAX_WAITING = 64
DRAINING = "this node is shutting down and takes no more blocks; put them on another"


class Put(Handler):
    """A stream of frames, one response."""

    request_type = pb.PutRequest
    register = staticmethod(grpc.stream_unary_rpc_method_handler)

    @property
    def timeout_s(self) -> float:
        return self.service.engine.config.put_timeout_s

    async def call(self, request: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
        if not self.service.admitting:
            raise TransportError(DRAINING)
        incoming = Incoming(self.service, self.service.caller(context).tenant)
        try:
            async for message in request:
                for frame in parse_put(message):
                    await incoming.take(frame)
            incoming.finish()
        finally:
            incoming.abandon()
        return pb.PutResponse(statuses=incoming.statuses).SerializeToString()


class Incoming:
    """The blocks of one Put stream: at most one is being written at a time.

    Those that are whole wait for each other while nothing has to leave for them: to commit several at once costs a node half as much.

    `statuses` has the outcome of each finished block, by index; what waits counts as stored. `open` says whether one more has begun, and
    `header` is that of the last that has, None where it was damaged.
    """

    def __init__(self, service: Service, owner: str = "") -> None:
        self.statuses: list[Status] = []
        self._service = service
        self._owner = owner
        self._request: Request | None = None
        self._last_key = b""
        self.open = False
        self.header: BlockHeader | None = None
        self._left = 0  # bytes of it that have not come
        self._reservation: Reservation | None = None
        self._writer: BlockWriter | None = None
        self._refusal = Status.DATA_LOSS
        self._waiting: dict[bytes, tuple[int, Reservation]] = {}  # by key
        self._shown: list[Distortion] = []  # of blocks that were committed and not counted

    @property
    def next_index(self) -> int:
        """Index of a block that begins now."""
        return len(self.statuses) + self.open

    async def take(self, frame: PutFrame) -> None:
        """Take the next frame.

        Raises
        ------
        InvalidInputError
            When frames do not follow the protocol; blocks that were finished before stay.
        """
        if len(frame.payload) > MAX_FRAME_BYTES:
            raise InvalidInputError(f"a frame holds at most {MAX_FRAME_BYTES} payload bytes, not {len(frame.payload)}")
        if frame.header is not None:
            self._close()
            if frame.index != len(self.statuses) or frame.index >= MAX_KEYS:
                raise InvalidInputError(f"block {frame.index} came where {len(self.statuses)} was due; count from 0, below {MAX_KEYS}")
            self._begin(frame.header, frame.input_tokens)
        elif not self.open or frame.index != len(self.statuses):
            raise InvalidInputError(f"payload of block {frame.index} came without its header; send the header in the block's first frame")
        self._left -= len(frame.payload)
        if self._reservation is not None and len(frame.payload):
            try:
                await self._service.copier.write(self._writer, frame.payload)
            except CorruptBlockError:
                self._refuse()

    def pause(self) -> None:
        """What has come for the moment: as `finish`, but for a block of which more is to come; `settle` before anything else happens."""
        if self.header is None or self._left <= 0:
            self._close()
        self._show()

    def settle(self) -> None:
        """Do what nobody need wait for."""
        self._service.engine.settle()
        shown, self._shown = self._shown, []
        for distortion in shown:
            self._service.distortion_keys.observe(distortion.keys)
            self._service.distortion_values.observe(distortion.values)

    def finish(self) -> None:
        """End the stream: commit the block that is open, if all of it has come, and those before it."""
        self._close()
        self._commit()

    def abandon(self) -> None:
        """The stream has ended, in whatever way: commit what is whole, and give the pages of an unfinished block back."""
        self._abort()
        self._commit()

    def _close(self) -> None:
        """End the block that is open, if any."""
        if not self.open:
            return
        if self._reservation is not None and self._writer.left:
            self._refuse()
        if self._reservation is not None:
            self._waiting[self._reservation.header.key] = len(self.statuses), self._reservation
        self.statuses.append(self._refusal if self._reservation is None else Status.OK)
        self._reservation = None
        self.open = False

    def _abort(self) -> None:
        if self._reservation is not None:
            reservation, self._reservation = self._reservation, None
            self._service.engine.abort(reservation)

    def _commit(self) -> None:
        self._show()
        self.settle()

    def _show(self) -> None:
        """Make visible what is whole."""
        waiting, self._waiting = self._waiting.values(), {}
        outcomes = self._service.engine.show(reservation for _, reservation in waiting)
        for (index, reservation), status in zip(waiting, outcomes, strict=True):
            self.statuses[index] = status
            if status is Status.OK:
                self._shown.append(reservation.header.rows[reservation.header.present - 1].distortion)

    def _begin(self, header_bytes: memoryview, input_tokens: int) -> None:
        if not self._service.admitting:
            raise TransportError(DRAINING)
        self.open = True
        engine = self._service.engine
        self.header = header = _header_of(header_bytes)
        if header is None:
            self._refuse()
            return
        self._left = header.payload_bytes
        if len(self._waiting) == MAX_WAITING or header.key in self._waiting or not engine.can_wait(header):
            self._commit()
        if self._request is None or header.parent != self._last_key:
            self._request = engine.request(input_tokens, block_id(self._owner, header.parent))
        self._last_key = header.key
        decision = engine.reserve(header, self._request, self._owner)
        if isinstance(decision, Status):
            self._refusal = decision
            return
        self._reservation = decision
        self._writer = BlockWriter(header, decision.layers, self._service.arena)

    def _refuse(self) -> None:
        """The block's bytes do not certify themselves: nothing of it stays."""
        self._abort()
        self._refusal = Status.DATA_LOSS
        self._service.metrics.corrupt_blocks.labels(where="put").inc()


def _header_of(data: memoryview) -> BlockHeader | None:
    """The header that `data` is, None where it is none."""
    try:
        header = BlockHeader.from_bytes(data)
    except CorruptBlockError:
        return None
    return header if header.header_bytes == len(data) else None
