"""The client's only door to the nodes, and the one place where gRPC's errors become ours.

A simulation replaces `GrpcTransport` by one that delivers in-process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import grpc
import grpc.aio

from kvstore.bulk import BULK_OPTIONS
from kvstore.errors import TransportError, error_for_status
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from .security import Security

SERVICE = "/concertina.kvstore.v1.KVStoreService/"
MAX_MESSAGE_BYTES = 16 << 20

CHANNEL_OPTIONS = (
    *BULK_OPTIONS,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # A restarted node must be found again within a second. What gRPC calls the least backoff is the time an attempt to
    # connect is given: a node that is slow to accept, beset or far away, is no dead one. A call's own deadline ends its wait.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 3_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


class Transport(Protocol):
    """Calls to store nodes by address. All raise `ConcertinaError`s only, and none outlasts its `timeout_s`."""

    def get(self, address: str, request: pb.GetRequest, timeout_s: float) -> AsyncIterator[bytes]:
        """The serialized `GetResponse`s. Closing the iterator cancels the call."""

    async def put(self, address: str, messages: Iterable[bytes], timeout_s: float) -> pb.PutResponse:
        """Send serialized `PutRequest`s; `messages` is drawn from as the node takes them."""

    async def call(self, address: str, rpc: str, request: Any, timeout_s: float) -> Any:
        """A unary call of ``KVStoreService``; `request` is its message."""

    async def keep(self, addresses: set[str]) -> None:
        """Drop what is held open to any other address."""

    async def close(self) -> None:
        """Drop everything."""


class GrpcTransport:
    """See `Transport`. One channel to each address, opened on use."""

    def __init__(self, security: Security | None = None) -> None:
        self._security = security or Security()
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def get(self, address: str, request: pb.GetRequest, timeout_s: float) -> AsyncIterator[bytes]:
        rpc = self._channel(address).unary_stream(SERVICE + "Get", request_serializer=pb.GetRequest.SerializeToString)
        call = rpc(request, timeout=timeout_s, metadata=self._security.metadata)
        try:
            with _translated(address):
                async for message in call:
                    yield message
        finally:
            call.cancel()

    async def put(self, address: str, messages: Iterable[bytes], timeout_s: float) -> pb.PutResponse:
        rpc = self._channel(address).stream_unary(SERVICE + "Put", response_deserializer=pb.PutResponse.FromString)
        with _translated(address):
            return _present(await rpc(iter(messages), timeout=timeout_s, metadata=self._security.metadata), address)

    async def call(self, address: str, rpc: str, request: Any, timeout_s: float) -> Any:
        response = getattr(pb, f"{rpc}Response")
        stub = self._channel(address).unary_unary(
            SERVICE + rpc, request_serializer=type(request).SerializeToString, response_deserializer=response.FromString
        )
        with _translated(address):
            return _present(await stub(request, timeout=timeout_s, metadata=self._security.metadata), address)

    async def keep(self, addresses: set[str]) -> None:
        for address in set(self._channels) - addresses:
            await self._channels.pop(address).close()

    async def close(self) -> None:
        await self.keep(set())

    def _channel(self, address: str) -> grpc.aio.Channel:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = self._security.channel(address, CHANNEL_OPTIONS)
        return channel


def _present(response: Any, address: str) -> Any:
    """`response`; gRPC gives None for a call that ended well without one, as one damaged on its way may."""
    if response is None:
        raise TransportError(f"node {address}: the call ended without an answer")
    return response


@contextmanager
def _translated(address: str) -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_for_status(error.code().name, f"node {address}: {error.details() or error.code().name}") from error
    except (grpc.aio.UsageError, asyncio.InvalidStateError) as error:
        raise error_for_status("UNAVAILABLE", f"node {address}: the channel was closed") from error
    except asyncio.CancelledError:
        # gRPC says the same word when a channel closes under a call as when our own task is cancelled.
        if asyncio.current_task().cancelling():  # type: ignore[union-attr]
            raise
        raise error_for_status("UNAVAILABLE", f"node {address}: the channel was closed") from None
