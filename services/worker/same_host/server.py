"""The replica's end: hands what proxies of this host and user ask to Serve's own servicer."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray
from ray.serve._private import replica
from ray.serve.generated.serve_pb2 import ASGIRequest

from kvstore.arena import is_own_user
from services.worker.same_host.frames import COUNT, WINDOW, Connection, Kind, path_of

log = logging.getLogger(__name__)

BACKLOG = 128
#: For as long as the process runs.
_OPEN: list[asyncio.Task[asyncio.Server]] = []


def open_beside_grpc() -> None:
    """Have the replica in this process answer on a Unix socket as well. Call it from the replica's constructor.

    Serve starts the replica's gRPC server after that, in the loop that runs requests; there the socket is opened.
    """
    add = replica.add_ASGIServiceServicer_to_server

    @functools.wraps(add)
    def both(servicer: Any, server: Any) -> None:
        add(servicer, server)
        path = path_of(ray.get_runtime_context().get_actor_id())
        try:
            _OPEN.append(listen(servicer, path))
        except OSError as error:
            log.warning("this replica is called over gRPC alone: %s: %s", path, error)

    replica.add_ASGIServiceServicer_to_server = both


def listen(servicer: Any, path: Path) -> asyncio.Task[asyncio.Server]:
    """Take connections on the Unix socket `path`, open to its own user alone, for as long as what is returned is kept.

    Raises
    ------
    OSError
        Where the path is taken, too long or no place for a socket.
    """
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    listener.setblocking(False)
    loop = asyncio.get_running_loop()
    return loop.create_task(loop.create_unix_server(lambda: Guest(servicer), sock=listener))


class Guest(Connection):
    """A proxy, with the calls that it has under way."""

    def __init__(self, servicer: Any) -> None:
        super().__init__()
        self._servicer = servicer
        self._calls: dict[int, tuple[asyncio.Task[None], asyncio.Semaphore]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if not is_own_user(transport.get_extra_info("socket")):
            self._transport.abort()

    def received(self, kind: Kind, call: int, payload: bytes) -> None:
        if kind not in (Kind.CANCEL, Kind.MORE):
            room = asyncio.Semaphore(WINDOW)
            self._calls[call] = asyncio.get_running_loop().create_task(self._answer(kind, call, payload, room)), room
        elif call in self._calls:  # else it ended in the meantime
            task, room = self._calls[call]
            if kind is Kind.CANCEL:
                task.cancel()
            else:
                for _ in range(*COUNT.unpack(payload)):
                    room.release()

    def ended(self) -> None:
        for task, _ in self._calls.values():
            task.cancel()

    async def _answer(self, kind: Kind, call: int, payload: bytes, room: asyncio.Semaphore) -> None:
        try:
            request, context = ASGIRequest.FromString(payload), Context(self, call)
            answer = getattr(self._servicer, kind.name)(request, context)
            if kind.is_stream:
                async with contextlib.aclosing(answer):
                    async for message in answer:
                        await room.acquire()
                        self.send(Kind.MESSAGE, call, message.SerializeToString())
                self.send(Kind.END, call)
            else:
                self.send(Kind.ANSWER, call, (await answer).SerializeToString())
        except Exception as error:  # the servicer puts those of requests into its answers
            log.exception("a call of Serve's proxy failed")
            self.send(Kind.FAILED, call, str(error).encode())
        finally:
            del self._calls[call]


class Context:
    """As much of gRPC's context as Serve's servicer uses for these methods."""

    def __init__(self, guest: Guest, call: int) -> None:
        self._guest, self._call = guest, call

    async def send_initial_metadata(self, metadata: Iterable[tuple[str, str]]) -> None:
        """Tell the proxy whether its request is accepted."""
        self._guest.send(Kind.ACCEPTED, self._call, json.dumps(dict(metadata)).encode())
