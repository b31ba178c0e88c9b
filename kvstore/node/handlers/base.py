"""What all handlers share: how an RPC is registered, parsed and answered. Deadline, errors and metrics are the server's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import grpc
from google.protobuf.message import DecodeError, Message
from prometheus_client import Histogram

from kvstore.arena import Arena
from kvstore.errors import InvalidInputError
from kvstore.metadata import NodeRecord
from kvstore.metrics import Metrics
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from ..copier import Copier
from ..engine import NodeEngine
from ..status import Status
from ..table import Entry


@dataclass(slots=True)
class Service:
    """What handlers work on: the node's parts, and whether it still takes blocks."""

    engine: NodeEngine
    arena: Arena
    copier: Copier
    metrics: Metrics
    record: NodeRecord
    admitting: bool = True
    distortion_keys: Histogram = field(init=False)
    distortion_values: Histogram = field(init=False)

    def __post_init__(self) -> None:
        series = self.metrics.block_distortion
        self.distortion_keys = series.labels(node=self.record.id, part="keys")
        self.distortion_values = series.labels(node=self.record.id, part="values")


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
        return (await self.answer(self.parse(request))).SerializeToString()

    @abstractmethod
    async def answer(self, request: Any) -> Message:
        """The response to a parsed request."""


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
