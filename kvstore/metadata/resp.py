"""One connection to Redis or Valkey: many callers' commands pipelined over it, answers handed out in order.

Replies are parsed by hiredis as they arrive, so that 2,000 of them cost about a millisecond. A caller that gives up leaves its
place in the line: its late answer is read and thrown away, never given to somebody else.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import hiredis
from redis.asyncio.connection import SSLConnection, parse_url

from kvstore.errors import ConcertinaError, ConfigError, DeadlineError, TransportError, error_for_status

#: Bytes of answers that may be outstanding in the parser; more means a peer that is no Redis of ours.
MAX_REPLY_BYTES = 256 << 20

#: First word of an error reply -> name of the gRPC status code. Any other is a peer that does not speak as it should.
_STATUS_OF_REPLY = {
    "NOAUTH": "UNAUTHENTICATED",
    "WRONGPASS": "UNAUTHENTICATED",
    "NOPERM": "PERMISSION_DENIED",
    "OOM": "RESOURCE_EXHAUSTED",
}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and how to connect; of a cluster's members only host and port differ."""

    host: str = "127.0.0.1"
    port: int = 6379
    path: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    db: int = 0
    tls: ssl.SSLContext | None = None

    @classmethod
    def from_url(cls, url: str) -> Endpoint:
        """``redis://``, ``rediss://`` (TLS) or ``unix://``.

        TLS takes the query fields ``ssl_ca_certs``, ``ssl_certfile``, ``ssl_keyfile`` (paths) and ``ssl_cert_reqs=none``.

        Raises
        ------
        ConfigError
            For a URL that cannot be read, or a field that is not known.
        """
        try:
            parts: dict[str, Any] = dict(parse_url(url))
            tls = parts.pop("connection_class", None) is SSLConnection
            context = _tls_context(parts) if tls else None
        except (ValueError, OSError) as error:
            raise ConfigError(f"bad Redis URL: {error}") from error
        unknown = set(parts) - {"host", "port", "path", "username", "password", "db"}
        if unknown:
            raise ConfigError(f"unknown field of a Redis URL: {', '.join(sorted(unknown))}")
        return cls(**parts, tls=context)


def _tls_context(parts: dict[str, Any]) -> ssl.SSLContext:
    """Take the ``ssl_`` fields out of `parts`."""
    context = ssl.create_default_context(cafile=parts.pop("ssl_ca_certs", None))
    certificate, key = parts.pop("ssl_certfile", None), parts.pop("ssl_keyfile", None)
    if certificate:
        context.load_cert_chain(certificate, key)
    if parts.pop("ssl_cert_reqs", "required") == "none":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def pack(*words: bytes | str | int) -> bytes:
    """One command as RESP bytes."""
    return hiredis.pack_command(words)


def error_of_reply(reply: Exception) -> ConcertinaError:
    """Our exception for an error reply."""
    text = str(reply)
    return error_for_status(_STATUS_OF_REPLY.get(text.split(" ", 1)[0], "UNAVAILABLE"), f"Redis answered: {text[:200]}")


def error_of_exception(error: BaseException, what: str) -> ConcertinaError:
    """Our exception for one of the socket, TLS or parser."""
    if isinstance(error, TimeoutError):
        return DeadlineError(f"Redis did not answer in time ({what})")
    return TransportError(f"Redis is away ({what}): {error or type(error).__name__}")


class RespConnection(asyncio.Protocol):
    """An open connection; make one with `open_connection`. Replies that are errors are returned, not raised."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader(protocolError=TransportError)
        self._waiting: deque[tuple[asyncio.Future[list[Any]], int]] = deque()
        self._replies: list[Any] = []
        self._pending_bytes = 0
        self._transport: asyncio.Transport | None = None

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def submit(self, packed: bytes, count: int) -> asyncio.Future[list[Any]]:
        """Send `count` commands in one write; the future holds their replies in order.

        Raises
        ------
        TransportError
            When the connection has ended (also set on the future, when it ends before the last reply).
        """
        if not self.usable:
            raise TransportError("the connection to Redis has ended")
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append((future, count))
        self._transport.write(packed)
        return future

    def abort(self) -> None:
        """Drop the connection; those who wait get a TransportError. Used after a deadline: the peer may be half dead."""
        if self._transport is not None:
            self._transport.abort()
        self._fail(TransportError("the connection to Redis was dropped"))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(error_of_exception(exc or ConnectionError("connection closed"), "in flight"))

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        self._pending_bytes += len(data)
        try:
            while self._waiting and self._read_replies():
                self._hand_out()
            if self._pending_bytes > MAX_REPLY_BYTES or (not self._waiting and self._reader.has_data()):
                raise TransportError("Redis sent more than was asked for")
        except TransportError:
            self.abort()

    def _read_replies(self) -> bool:
        """Parse what has come for the first in line. Returns whether it is complete."""
        gets, replies = self._reader.gets, self._replies
        for _ in range(self._waiting[0][1] - len(replies)):
            reply = gets()
            if reply is False:
                return False
            replies.append(reply)
            self._pending_bytes = 0
        return True

    def _hand_out(self) -> None:
        """Give the first in line its replies, which are complete."""
        future, _ = self._waiting.popleft()
        if not future.done():
            future.set_result(self._replies)
        self._replies = []

    def _fail(self, error: ConcertinaError) -> None:
        waiting, self._waiting = self._waiting, deque()
        for future, _ in waiting:
            if not future.done():
                future.set_exception(error)
                future.exception()  # whoever gave up on it will not look


async def open_connection(endpoint: Endpoint, setup: list[bytes]) -> RespConnection:
    """Connect, authenticate, select the database and run the packed commands of `setup`. The caller sets the deadline.

    Raises
    ------
    TransportError, AuthenticationError, PermissionDeniedError
    """
    loop = asyncio.get_running_loop()
    try:
        if endpoint.path:
            _, connection = await loop.create_unix_connection(RespConnection, endpoint.path)
        else:
            name = endpoint.host if endpoint.tls else None
            _, connection = await loop.create_connection(
                RespConnection, endpoint.host, endpoint.port, ssl=endpoint.tls, server_hostname=name
            )
    except OSError as error:
        raise error_of_exception(error, f"{endpoint.path or f'{endpoint.host}:{endpoint.port}'}") from error
    commands = list(setup)
    if endpoint.db:
        commands.insert(0, pack("SELECT", endpoint.db))
    if endpoint.password:
        commands.insert(0, pack("AUTH", *filter(None, (endpoint.username, endpoint.password))))
    try:
        replies = await connection.submit(b"".join(commands), len(commands)) if commands else []
        if failed := next((r for r in replies if isinstance(r, hiredis.ReplyError)), None):
            raise error_of_reply(failed)
    except BaseException:
        connection.abort()
        raise
    return connection
