"""What goes over the socket: frames of a head (bytes that follow, number of the call, kind) and a payload.

The proxy opens a call by a frame of one of the four methods of Serve's ``ASGIService``, with the ``ASGIRequest`` as payload. The replica
answers ACCEPTED (initial metadata as JSON), then either ANSWER, or MESSAGE as often as it likes and END; or FAILED (the reason) at any
time. A stream may be WINDOW messages ahead of who reads it: MORE from the proxy allows as many as its payload says.
"""

from __future__ import annotations

import asyncio
import struct
from enum import IntEnum
from pathlib import Path
from typing import Any

import ray

HEAD = struct.Struct("<IIB")
COUNT = struct.Struct("<H")
#: Of a payload. A proxy takes requests of at most 16 MiB, and prompts and answers are text.
MAX_BYTES = 64 << 20
WINDOW = 64
#: Of an actor's, all of them random: a Unix socket's path may have 107 bytes.
ID_DIGITS = 16


class Kind(IntEnum):
    """Kinds of frames; the first four have the names of the methods."""

    HandleRequest = 0
    HandleRequestStreaming = 1
    HandleRequestWithRejection = 2
    HandleRequestWithRejectionStreaming = 3
    CANCEL = 16
    MORE = 17
    ACCEPTED = 32
    ANSWER = 33
    MESSAGE = 34
    END = 35
    FAILED = 36

    @property
    def is_stream(self) -> bool:
        """Whether a call of this method is answered by many messages."""
        return self in (Kind.HandleRequestStreaming, Kind.HandleRequestWithRejectionStreaming)


def path_of(actor_id: str) -> Path:
    """Where the replica that is the actor `actor_id` (hexadecimal) listens, beside the sockets of Ray itself."""
    here = ray.get_runtime_context()
    return Path(here.get_temp_dir(), here.get_session_name(), "sockets", f"replica-{actor_id[:ID_DIGITS]}")


class Connection(asyncio.Protocol):
    """One end: cuts what comes into frames. Frames that are sent before the transport is there wait for it."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._unsent = bytearray()
        self._heard = bytearray()
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._transport.write(bytes(self._unsent))
        self._unsent.clear()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self.ended()

    def data_received(self, data: bytes) -> None:
        heard = self._heard
        heard += data
        at, have = 0, len(heard)
        while have - at >= HEAD.size:
            size, call, kind = HEAD.unpack_from(heard, at)
            if size > MAX_BYTES:
                raise ValueError(f"a frame of {size} bytes")  # asyncio reports it and closes the connection
            end = at + HEAD.size + size
            if end > have:
                break
            self.received(Kind(kind), call, bytes(heard[at + HEAD.size : end]))
            at = end
        del heard[:at]

    def send(self, kind: Kind, call: int, payload: bytes = b"") -> None:
        """Send a frame. On a lost connection it goes nowhere: who waits for an answer has been told."""
        frame = HEAD.pack(len(payload), call, kind) + payload
        if self._transport is None:
            self._unsent += frame
        elif not self.lost:
            self._transport.write(frame)

    def received(self, kind: Kind, call: int, payload: bytes) -> None:
        """A frame has come."""
        raise NotImplementedError

    def ended(self) -> None:
        """The connection is gone."""
        raise NotImplementedError
