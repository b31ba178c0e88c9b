"""Calls between clients and nodes in this process: the node's real handlers behind a network that misbehaves.

A call keeps gRPC's habits. A stream's frames arrive in order, at most a few ahead of their reader; a call that the client gives up is
cancelled at the node a while later, if the word gets through; a request on its way may arrive after the client has stopped waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

from kvstore.errors import ConcertinaError, ConfigError, DeadlineError, TransportError, error_for_status, status_name
from kvstore.node.handlers import HANDLERS, handler_class
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from .loop import on_host
from .network import Network

#: Messages of a stream that may be on their way at one time.
WINDOW = 2
#: After so long without a word from the client, a node takes it for gone.
KEEPALIVE_S = 3.0


class Context:
    """The part of a gRPC context that handlers use; what they write goes to the caller, with back-pressure."""

    def __init__(self, call: Call) -> None:
        self._call = call

    async def write(self, message: bytes) -> None:
        await self._call.answer(message)

    def invocation_metadata(self) -> tuple:
        return ()

    def peer(self) -> str:
        return f"sim:{self._call.client}"


class SimServer:
    """Serves a node's handlers on the simulated network; takes the place of `kvstore.node.server.Server`."""

    def __init__(self, wire: Wire, host: str, service: Any) -> None:
        self._wire = wire
        self.host = host
        self.handlers = {rpc: handler_class(rpc)(service) for rpc in HANDLERS}
        self.calls: dict[asyncio.Task, None] = {}
        self.listening = ""

    async def start(self, listen: str) -> int:
        if listen in self._wire.servers:
            raise ConfigError(f"cannot listen on {listen}: it is taken")
        self._wire.servers[listen] = self
        self.listening = listen
        return int(listen.rpartition(":")[2])

    async def drain(self) -> None:
        """There are no health checkers."""

    async def stop(self, grace_s: float) -> None:
        self.close()
        if self.calls:
            await asyncio.wait(list(self.calls), timeout=grace_s)
        for call in list(self.calls):
            call.cancel()

    @property
    def listens(self) -> bool:
        """Whether calls to its address come here."""
        return self._wire.servers.get(self.listening) is self

    def close(self) -> None:
        """Listen no more."""
        if self.listens:
            del self._wire.servers[self.listening]

    def serve(self, call: Call, rpc: str, request: Any) -> asyncio.Task:
        """Run a handler as a task of the node."""
        call.server = self
        call.task = task = on_host(self._wire.network.loop, self.host, self._serve(call, rpc, request))
        self.calls[task] = None
        task.add_done_callback(lambda done: self.calls.pop(done, None))
        task.add_done_callback(call.handler_ended)
        return task

    async def _serve(self, call: Call, rpc: str, request: Any) -> bytes | None:
        handler = self.handlers[rpc]
        try:
            async with asyncio.timeout(handler.timeout_s):
                response = await handler.call(request, Context(call))
        except TimeoutError:
            raise DeadlineError(f"{rpc} took too long") from None
        except ConcertinaError:
            raise
        except Exception as error:
            self._wire.network.history.violation(f"{rpc} failed inside {self.host}: {error!r}")
            raise
        self._wire.observe(self, rpc, request, response)
        return response


class Call:
    """One call under way. The client reads `messages`; None in it is the end, an exception the failure."""

    def __init__(self, wire: Wire, client: str, address: str) -> None:
        self.wire = wire
        self.client = client
        self.address = address
        self.messages: asyncio.Queue[Any] = asyncio.Queue()
        self.response: bytes | None = None
        self._abandoned = False
        self._window = asyncio.Semaphore(WINDOW)
        self.server: SimServer | None = None
        self.task: asyncio.Task | None = None

    async def begin(self, rpc: str, request: Any) -> None:
        """Carry the request to the node and run it there. Runs as a task of the network: the client may have gone."""
        network = self.wire.network
        host = self.wire.host_of(self.address)
        try:
            await network.hop(self.client, host)
            server = self.wire.servers.get(self.address)
            if server is None:
                raise TransportError(f"nobody listens on {self.address}")
        except TransportError as error:
            self.messages.put_nowait(error)
            return
        server.serve(self, rpc, request)
        network.history.note(rpc, self.client, server.host)
        if self._abandoned:
            self.abandon()
        if isinstance(request, bytes) and network.rng.random() < network.knobs.duplicate:
            network.history.note("duplicate", rpc)
            server.serve(Call(self.wire, self.client, self.address), rpc, request)

    async def answer(self, message: bytes) -> None:
        """Carry one message of the stream to the client."""
        try:
            async with asyncio.timeout(KEEPALIVE_S):
                await self._window.acquire()
                await self.wire.network.hop(self.server.host, self.client)
        except TimeoutError:
            raise TransportError("the client went away") from None
        self.messages.put_nowait(self.wire.network.flipped(message))

    def taken(self) -> None:
        """The client has read a message: one more may be on its way."""
        self._window.release()

    def handler_ended(self, task: asyncio.Task) -> None:
        """Carry the outcome to the client."""
        self.wire.in_background(self._finish(task))

    async def _finish(self, task: asyncio.Task) -> None:
        error = TransportError("the node ended the call") if task.cancelled() else task.exception()
        try:
            await self.wire.network.hop(self.server.host, self.client)
            if error:
                raise error_for_status(status_name(error), str(error))
            self.response = task.result()
            self.messages.put_nowait(None)
        except ConcertinaError as error:
            self.messages.put_nowait(error)

    def abandon(self) -> None:
        """The client waits no longer; the node hears of it later, if it does."""
        self._abandoned = True
        if self.task is not None and not self.task.done():
            self.wire.in_background(self._cancel(self.task))

    async def _cancel(self, task: asyncio.Task) -> None:
        try:
            await self.wire.network.hop(self.client, self.server.host)
        except TransportError:
            await asyncio.sleep(KEEPALIVE_S)
        task.cancel()


class Wire:
    """All calls of one simulation. `observe` is told of every call that a node has answered."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.servers: dict[str, SimServer] = {}
        self.observe = lambda server, rpc, request, response: None

    def host_of(self, address: str) -> str:
        """The host that has this address, whoever listens there now."""
        server = self.servers.get(address)
        return server.host if server else address.partition(":")[0]

    def in_background(self, coroutine: Any) -> None:
        """Run something as the network itself: it outlives the hosts."""
        on_host(self.network.loop, "network", coroutine)


class SimTransport:
    """`kvstore.client.Transport` for one client."""

    def __init__(self, wire: Wire, client: str) -> None:
        self._wire = wire
        self._client = client

    async def get(self, address: str, request: pb.GetRequest, timeout_s: float) -> AsyncIterator[bytes]:
        call = self._begin(address, "Get", request.SerializeToString())
        ends = self._wire.network.loop.time() + timeout_s
        try:
            while (message := await self._next(call, ends)) is not None:
                call.taken()
                yield message
        finally:
            call.abandon()

    async def put(self, address: str, messages: Iterable[bytes], timeout_s: float) -> pb.PutResponse:
        return pb.PutResponse.FromString(await self._once(address, "Put", self._upload(messages, address), timeout_s))

    async def call(self, address: str, rpc: str, request: Any, timeout_s: float) -> Any:
        response = await self._once(address, rpc, request.SerializeToString(), timeout_s)
        return getattr(pb, f"{rpc}Response").FromString(response)

    async def keep(self, addresses: set[str]) -> None:
        """Nothing is held open."""

    async def close(self) -> None:
        """Nothing is held open."""

    async def _once(self, address: str, rpc: str, request: Any, timeout_s: float) -> bytes:
        call = self._begin(address, rpc, request)
        try:
            await self._next(call, self._wire.network.loop.time() + timeout_s)
            return call.response
        finally:
            call.abandon()

    def _begin(self, address: str, rpc: str, request: Any) -> Call:
        call = Call(self._wire, self._client, address)
        self._wire.in_background(call.begin(rpc, request))
        return call

    async def _upload(self, messages: Iterable[bytes], address: str) -> AsyncIterator[bytes]:
        network = self._wire.network
        for message in messages:
            await network.hop(self._client, self._wire.host_of(address))
            yield network.flipped(message)

    async def _next(self, call: Call, ends: float) -> bytes | None:
        try:
            async with asyncio.timeout_at(ends):
                item = await call.messages.get()
        except TimeoutError:
            raise DeadlineError(f"node {call.address}: the deadline passed") from None
        if isinstance(item, Exception):
            raise item
        return item
