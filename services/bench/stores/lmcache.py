"""LMCache's own server (``lm://``), spoken to as its client speaks, from plain sockets: no torch object is made on either way."""

from __future__ import annotations

import shutil
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvstore.errors import TransportError

from .base import Store, Values
from .party import free_port, wait_for_port, working

_REQUEST = struct.Struct("9i150s")  # command, bytes, format, dtype, location, shape[4], key
_REPLY = struct.Struct("9i")  # 200 or 400, bytes, …
_PUT, _GET, _EXIST = 1, 2, 3
_FORMAT, _UINT8, _FOUND = 1, 6, 200


def missing() -> str | None:
    """Why it cannot be run here; None where it can."""
    return None if shutil.which("lmcache_server") else "lmcache is not installed (its command lmcache_server is not on the PATH)"


@contextmanager
def server() -> Iterator[dict[str, Any]]:
    """A server, as long as the block runs. Says where it is."""
    port = free_port()
    with working(["lmcache_server", "127.0.0.1", str(port), "cpu"]):
        wait_for_port(port)
        yield {"lmcache_port": port}


class LmCache(Store):
    """One connection. A put is not answered, so an EXIST of the last key ends it."""

    def __init__(self, values: Values, where: dict) -> None:
        super().__init__(values, where)
        self._peer = socket.create_connection(("127.0.0.1", where["lmcache_port"]))
        self._peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._names = [f"bench@1@0@{int.from_bytes(key[:7], 'big'):x}@half" for key in values.keys]

    def put(self) -> None:
        for at, value in enumerate(self.values.data):
            self._ask(_PUT, at, len(value))
            self._peer.sendall(value)
        self._ask(_EXIST, self.values.count - 1, 0)
        self._answer()

    def get(self) -> None:
        for at in range(self.values.count):
            self._ask(_GET, at, 0)
            if self._answer() != self.values.size_bytes:
                raise TransportError("LMCache's server returned another number of bytes")
            self._fill(self.values.place(at))

    def close(self) -> None:
        self._peer.close()

    def _ask(self, command: int, at: int, size: int) -> None:
        name = self._names[at].encode().ljust(150)
        self._peer.sendall(_REQUEST.pack(command, size, _FORMAT, _UINT8, 0, size, 0, 0, 0, name))

    def _answer(self) -> int:
        reply = bytearray(_REPLY.size)
        self._fill(memoryview(reply))
        code, size, *_ = _REPLY.unpack(reply)
        if code != _FOUND:
            raise TransportError("LMCache's server does not have a value that was put")
        return size

    def _fill(self, buffer: memoryview) -> None:
        while len(buffer):
            got = self._peer.recv_into(buffer)
            if not got:
                raise ConnectionError("LMCache's server is gone")
            buffer = buffer[got:]
