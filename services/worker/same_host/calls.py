"""The proxy's end: what Serve takes for a stub and for gRPC's calls."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from functools import partialmethod
from pathlib import Path
from typing import Any

import grpc
from grpc.aio import AioRpcError, Metadata
from ray.serve.generated.serve_pb2 import ASGIRequest, ASGIResponse
from ray.serve.request_router import RunningReplica

from kvstore.arena import is_own_user
from services.worker.same_host.frames import COUNT, WINDOW, Connection, Kind, path_of

log = logging.getLogger(__name__)


class SameHostReplica(RunningReplica):
    """A replica as a router of Serve sees it, called over its Unix socket where it has one on this host."""

    _near: Stub | None = None

    @property
    def stub(self) -> Stub:
        if self._near is None:
            self._near = Stub(path_of(self.actor_id.hex()), lambda: super(SameHostReplica, self).stub)
        return self._near


class Stub:
    """In place of an ``ASGIServiceStub``.

    Parameters
    ----------
    path : Path
        Where the replica listens, if it is on this host.
    distant : callable
        Gives the stub over gRPC, for a replica that does not listen there.
    """

    def __init__(self, path: Path, distant: Callable[[], Any]) -> None:
        self._path, self._distant = path, distant
        self._line: Line | None = None
        self._is_here = True

    def _call(self, method: Kind, request: ASGIRequest) -> Any:
        if self._is_here and (self._line is None or self._line.lost):
            self._connect()
        if not self._is_here:
            return getattr(self._distant(), method.name)(request)
        return self._line.call(method, request.SerializeToString())

    HandleRequest = partialmethod(_call, Kind.HandleRequest)
    HandleRequestStreaming = partialmethod(_call, Kind.HandleRequestStreaming)
    HandleRequestWithRejection = partialmethod(_call, Kind.HandleRequestWithRejection)
    HandleRequestWithRejectionStreaming = partialmethod(_call, Kind.HandleRequestWithRejectionStreaming)

    def _connect(self) -> None:
        """A replica listens before it is routed to and until its process ends, so who is refused once need not ask again."""
        peer = socket.socket(socket.AF_UNIX)
        peer.setblocking(False)  # to connect takes no time on a Unix socket
        try:
            peer.connect(str(self._path))
            self._is_here = is_own_user(peer)
        except OSError as error:
            log.debug("no replica at %s: %s", self._path, error)
            self._is_here = False
        if self._is_here:
            self._line = Line(peer)
        else:
            peer.close()


class Line(Connection):
    """The connection with one replica, and the calls on it."""

    def __init__(self, peer: socket.socket) -> None:
        super().__init__()
        self._calls: dict[int, Call] = {}
        self._numbers = itertools.count()
        loop = asyncio.get_running_loop()
        self._opening = loop.create_task(loop.create_unix_connection(lambda: self, sock=peer))

    def call(self, method: Kind, request: bytes) -> Call:
        """Send a request."""
        number = next(self._numbers) & 0xFFFFFFFF
        call = self._calls[number] = (StreamCall if method.is_stream else UnaryCall)(self, number)
        self.send(method, number, request)
        return call

    def forget(self, number: int) -> None:
        """Nobody waits for the rest of a call."""
        self._calls.pop(number, None)

    def received(self, kind: Kind, call: int, payload: bytes) -> None:
        asked = self._calls.get(call)
        if asked is None:  # cancelled, and this was under way
            return
        if kind is Kind.ACCEPTED:
            asked.accept(Metadata(*json.loads(payload).items()))
            return
        if kind in (Kind.ANSWER, Kind.MESSAGE):
            asked.take(ASGIResponse.FromString(payload))
        if kind is not Kind.MESSAGE:
            self.forget(call)
            asked.end(failure(grpc.StatusCode.INTERNAL, payload.decode()) if kind is Kind.FAILED else None)

    def ended(self) -> None:
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.end(failure(grpc.StatusCode.UNAVAILABLE, "the replica's end of the connection is closed"))


def failure(code: grpc.StatusCode, details: str) -> AioRpcError:
    """What gRPC would raise."""
    return AioRpcError(code, Metadata(), Metadata(), details)


class Call:
    """What Serve uses of gRPC's calls. It ends by the answer, an error, a lost connection or `cancel`."""

    def __init__(self, line: Line, number: int) -> None:
        self._line, self._number = line, number
        self._accepted, self._news = asyncio.Event(), asyncio.Event()
        self._metadata: Metadata | None = None
        self._messages: deque[ASGIResponse] = deque()
        self._ended = False
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[Call], None]] = []

    async def wait_for_connection(self) -> None:
        """It stood before there was a call."""

    async def initial_metadata(self) -> Metadata:
        """Wait for it."""
        await self._waited(self._accepted)
        if self._metadata is None:
            raise self._error or failure(grpc.StatusCode.INTERNAL, "the replica answered without metadata")
        return self._metadata

    async def code(self) -> grpc.StatusCode:
        """Wait for the end."""
        while not self._ended:
            await self._next_news()
        return self._error.code() if isinstance(self._error, AioRpcError) else grpc.StatusCode.OK

    async def details(self) -> str:
        """Wait for the end."""
        await self.code()
        return str(self._error or "")

    def add_done_callback(self, callback: Callable[[Call], None]) -> None:
        """Call `callback` when this has ended."""
        if self._ended:
            callback(self)
        else:
            self._callbacks.append(callback)

    def cancel(self) -> bool:
        """Have the replica stop. Gives whether there was something to stop."""
        if self._ended:
            return False
        self._line.send(Kind.CANCEL, self._number)
        self._line.forget(self._number)
        self._messages.clear()
        self.end(asyncio.CancelledError())
        return True

    def accept(self, metadata: Metadata) -> None:
        """Initial metadata have come."""
        self._metadata = metadata
        self._accepted.set()

    def take(self, message: ASGIResponse) -> None:
        """A message has come."""
        self._messages.append(message)
        self._news.set()

    def end(self, error: BaseException | None) -> None:
        """Nothing more will come."""
        self._ended, self._error = True, error
        self._accepted.set()
        self._news.set()
        for callback in self._callbacks:
            callback(self)

    async def _next(self) -> ASGIResponse | None:
        """The next message; None at the end."""
        while not self._messages and not self._ended:
            await self._next_news()
        if self._messages:
            return self._messages.popleft()
        if self._error:
            raise self._error
        return None

    async def _next_news(self) -> None:
        self._news.clear()
        await self._waited(self._news)

    async def _waited(self, event: asyncio.Event) -> None:
        """Wait; who is cancelled meanwhile cancels the call, as with gRPC."""
        try:
            await event.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise


class UnaryCall(Call):
    """Awaited, as often as one likes."""

    _answer: ASGIResponse | None = None

    def __await__(self) -> Generator[Any, None, ASGIResponse]:
        return self._only().__await__()

    async def _only(self) -> ASGIResponse:
        self._answer = self._answer or await self._next()
        if self._answer is None:
            raise failure(grpc.StatusCode.INTERNAL, "the replica ended a call without an answer")
        return self._answer


class StreamCall(Call):
    """Iterated over."""

    async def __aiter__(self) -> AsyncIterator[ASGIResponse]:
        taken = 0
        while (message := await self._next()) is not None:
            taken += 1
            if taken % (WINDOW // 2) == 0:
                self._line.send(Kind.MORE, self._number, COUNT.pack(WINDOW // 2))
            yield message
