"""Put: blocks into the arena, in two phases: pages are reserved and written, and only a verified block is made visible."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import grpc

from kvstore.block import BlockHeader, Distortion
from kvstore.errors import CorruptBlockError, InvalidInputError, TransportError
from kvstore.eviction.base import Request
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from ..config import MAX_FRAME_BYTES, MAX_KEYS
from ..copier import BlockWriter
from ..engine import Reservation
from ..status import Status
from ..table import Entry, block_id
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
        self._told = 0  # of `statuses`
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
            if frame.index != self.next_index:
                raise InvalidInputError(f"block {frame.index} came where {self.next_index} was due; count from 0")
            self.begin(header_of(frame.header), frame.input_tokens)
        elif frame.index != len(self.statuses):
            raise InvalidInputError(f"payload of block {frame.index} came without its header; send the header in the block's first frame")
        await self.go_on(frame.payload)

    def begin(self, header: BlockHeader | None, input_tokens: int) -> None:
        """The next block begins; None where its header is damaged.

        Raises
        ------
        InvalidInputError
            After too many blocks.
        """
        self._close()
        if not self._service.admitting:
            raise TransportError(DRAINING)
        if len(self.statuses) >= MAX_KEYS:
            raise InvalidInputError(f"one call takes at most {MAX_KEYS} blocks")
        self.open, self.header = True, header
        if header is None:
            self._refuse()
            return
        self._left = header.payload_bytes
        engine = self._service.engine
        if len(self._waiting) == MAX_WAITING or header.key in self._waiting or not engine.can_wait(header):
            self.settle()
        request = self._request_of(header, input_tokens)
        self._last_key = header.key
        decision = engine.reserve(header, request, self._owner)
        if isinstance(decision, Status):
            self._refusal = decision
            return
        self._reservation = decision
        self._writer = BlockWriter(header, decision.layers, self._service.arena)

    async def go_on(self, payload: memoryview) -> None:
        """More of the block that is open. Raises InvalidInputError where there is none."""
        if not self.open:
            raise InvalidInputError("payload came without its header; send the header in the block's first frame")
        self._left -= len(payload)
        if self._reservation is not None and len(payload):
            try:
                await self._service.copier.write(self._writer, payload)
            except CorruptBlockError:
                self._refuse()

    def take_run(self, blocks: Sequence[tuple[BlockHeader, int, int]]) -> int:
        """Take the leading blocks of a chain at once, as far as none needs a decision: header, input tokens, address of the whole payload.

        Returns how many; where it is none, `begin` the first.
        """
        self._close()
        if len(self._waiting) == MAX_WAITING:
            self.settle()
        room = min(MAX_WAITING - len(self._waiting), MAX_KEYS - len(self.statuses))
        if not self._service.admitting:
            return 0
        request = self._request_of(*blocks[0][:2])
        run = self._service.engine.reserve_run((header for header, _, _ in blocks[:room]), request, self._owner)
        sources = [(reservation.header, reservation.layers, address) for reservation, (_, _, address) in zip(run, blocks, strict=False)]
        damaged = self._service.copier.write_all(sources)
        for number, reservation in enumerate(run):
            if number in damaged:
                self._reservation = reservation
                self._refuse()
            else:
                self._waiting[reservation.header.key] = len(self.statuses), reservation
            self.statuses.append(self._refusal if number in damaged else Status.OK)
        if run:
            self._last_key = run[-1].header.key
        return len(run)

    def pause(self) -> list[Status]:
        """What has come for the moment is to be answered: outcomes since the last time; `settle`, which makes them true, comes next."""
        if self.header is None or self._left <= 0:
            self._close()
        for index, reservation in self._waiting.values():
            self.statuses[index] = self._service.engine.outcome(reservation)
        told, self._told = self._told, len(self.statuses)
        return self.statuses[told:]

    def settle(self) -> list[Entry]:
        """Make visible what is whole, and do what nobody need wait for. Returns what was not visible before."""
        self._show()
        entries = self._service.engine.settle()
        shown, self._shown = self._shown, []
        for distortion in shown:
            self._service.distortion_keys.observe(distortion.keys)
            self._service.distortion_values.observe(distortion.values)
        return entries

    def finish(self) -> None:
        """End the stream: commit the block that is open, if all of it has come, and those before it."""
        self._close()
        self.settle()

    def abandon(self) -> None:
        """The stream has ended, in whatever way: commit what is whole, and give the pages of an unfinished block back."""
        self._abort()
        self.settle()

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

    def _show(self) -> None:
        """Make visible what is whole."""
        waiting, self._waiting = self._waiting.values(), {}
        outcomes = self._service.engine.show(reservation for _, reservation in waiting)
        for (index, reservation), status in zip(waiting, outcomes, strict=True):
            self.statuses[index] = status
            if status is Status.OK:
                self._shown.append(reservation.header.rows[reservation.header.present - 1].distortion)

    def _request_of(self, header: BlockHeader, input_tokens: int) -> Request:
        """The request that the next block belongs to: that of the block before, if it follows on it."""
        if self._request is None or header.parent != self._last_key:
            self._request = self._service.engine.request(input_tokens, block_id(self._owner, header.parent))
            self._last_key = header.parent  # the same block may be asked for again
        return self._request

    def _refuse(self) -> None:
        """The block's bytes do not certify themselves: nothing of it stays."""
        self._abort()
        self._refusal = Status.DATA_LOSS
        self._service.metrics.corrupt_blocks.labels(where="put").inc()


def header_of(data: memoryview) -> BlockHeader | None:
    """The header that `data` is, None where it is none."""
    try:
        header = BlockHeader.from_bytes(data)
    except CorruptBlockError:
        return None
    return header if header.header_bytes == len(data) else None
