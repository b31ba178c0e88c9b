"""What all handlers share: how an RPC is registered, parsed and answered. Deadline, errors and metrics are the server's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import grpc
from google.protobuf.message import DecodeError, Message
from prometheus_client import Histogram

from kvstore.arena import Arena
from kvstore.block import EncodedBlock
from kvstore.credentials import Caller, Credentials
from kvstore.errors import InvalidInputError
from kvstore.metadata import NodeRecord
from kvstore.metrics import Metrics
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from ..copier import Copier
from ..engine import NodeEngine
from ..plans import check_keys
from ..spill import Spill
from ..spill.promote import promote
from ..status import Status
from ..table import Entry, block_id
from ..tls import names_of_peer


@dataclass(slots=True)
class Service:
    """What handlers work on: the node's parts, whose calls it answers, and whether it still takes blocks."""

    engine: NodeEngine
    arena: Arena
    copier: Copier
    metrics: Metrics
    record: NodeRecord
    spill: Spill = field(default_factory=Spill)
    credentials: Credentials = field(default_factory=Credentials)
    admitting: bool = True
    distortion_keys: Histogram = field(init=False)
    distortion_values: Histogram = field(init=False)

    def __post_init__(self) -> None:
        series = self.metrics.block_distortion
        self.distortion_keys = series.labels(node=self.record.id, part="keys")
        self.distortion_values = series.labels(node=self.record.id, part="values")

    def caller(self, context: grpc.aio.ServicerContext) -> Caller:
        """Whose call this is. Raises AuthenticationError where a credential is asked for and there is none that is known."""
        if not self.credentials.required:
            return self.credentials.caller(())
        return self.credentials.caller(context.invocation_metadata() or (), names_of_peer(context))

    def ids(self, caller: Caller, keys: Sequence[bytes]) -> list[bytes]:
        """The ids of the blocks that a caller means by `keys`: its own, and for an admin anybody's where it has none itself.

        Raises
        ------
        InvalidInputError
            For too many keys, or one that is not 32 bytes.
        """
        check_keys(keys)
        if not caller.tenant:
            return list(keys)
        own = [block_id(caller.tenant, key) for key in keys]
        if not caller.admin:
            return own
        return [next(iter(self.every_id(key)), id) if self._absent(id) else id for key, id in zip(keys, own, strict=True)]

    def every_id(self, key: bytes) -> list[bytes]:
        """The ids of all blocks of a key, resident or spilled, whoever owns them."""
        ids = [entry.id for entry in self.engine.table.named(key)] + [id for id, _ in self.spill.named(key)]
        return list(dict.fromkeys(ids))

    async def promote(self, ids: Sequence[bytes]) -> None:
        """Bring spilled blocks back into the arena, as far as it has room for them."""
        for id in ids:
            if self.engine.table.get(id) is None:
                async with self.spill.reading(id) as block:
                    if block is not None:
                        await self.promote_read(id, block)

    async def promote_read(self, id: bytes, block: EncodedBlock) -> None:
        """The same for a block that has just been read, unless its owner has dropped it meanwhile."""
        spilled = self.spill.find(id)
        if spilled is not None and self.admitting:
            request = self.engine.request(after=block_id(spilled.owner, block.header.parent))
            await promote(self.engine, self.arena, self.copier, block, spilled.owner, request)

    def _absent(self, id: bytes) -> bool:
        return self.engine.table.get(id) is None and self.spill.find(id) is None


class Handler(ABC):
    """One RPC. `request_type` is its message; `timeout_s` bounds a call, whatever the caller allows.

    Attributes
    ----------
    register : callable
        The `grpc` function that makes a method handler of its shape (unary or stream on each side).
    """

    request_type: ClassVar[type[Message]]
    register: ClassVar[Any] = staticmethod(grpc.unary_unary_rpc_method_handler)

    def __init__(self, service: Service) -> None:
        self.service = service

    @property
    def timeout_s(self) -> float:
        return 10.0

    @abstractmethod
    async def call(self, request: bytes | AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes | None:
        """Answer one call, in serialized messages. Raises errors of `kvstore.errors`."""

    def parse(self, data: bytes) -> Any:
        """The request message. Raises InvalidInputError for bytes that are none."""
        try:
            return self.request_type.FromString(data)
        except DecodeError as error:
            raise InvalidInputError(f"these bytes are no {self.request_type.__name__}: {error}") from None


class UnaryHandler(Handler):
    """One message in, one out."""

    async def call(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return (await self.answer(self.parse(request), self.service.caller(context))).SerializeToString()

    @abstractmethod
    async def answer(self, request: Any, caller: Caller) -> Message:
        """The response to a parsed request. It must not tell `caller`, unless an admin, of anybody else's blocks."""


def summary(entry: Entry, now: float, pinned: bool) -> pb.BlockSummary:
    """A resident block without its bytes."""
    header = entry.header
    return pb.BlockSummary(
        key=header.key,
        status=Status.OK,
        size_bytes=header.total_bytes,
        fidelity=header.present,
        fidelities=len(header.rows),
        start=header.start,
        tokens=header.tokens,
        parent=header.parent,
        codec=header.codec,
        idle_seconds=max(0.0, now - entry.last_use),
        pinned=pinned,
        namespace=header.namespace,
    )
