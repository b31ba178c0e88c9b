"""The yardstick of the wire: bytes over one TCP connection, from memory to memory, by blocking calls of Python, and nothing else."""

from __future__ import annotations

import socket
import struct
import sys
import threading

import numpy as np

from .base import Store, Values

_REQUEST = struct.Struct("<cQQ")  # operation, number of values, bytes of each
_DONE = b"."


class PlainTcp(Store):
    """Puts with `sendall`, gets with `recv_into`."""

    def __init__(self, values: Values, where: dict) -> None:
        super().__init__(values, where)
        self._peer = socket.create_connection(("127.0.0.1", where["plain_tcp_port"]))
        self._peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def put(self) -> None:
        self._peer.sendall(_REQUEST.pack(b"p", self.values.count, self.values.size_bytes))
        for value in self.values.data:
            self._peer.sendall(value)
        self._peer.recv(1)

    def get(self) -> None:
        self._peer.sendall(_REQUEST.pack(b"g", self.values.count, self.values.size_bytes))
        for at in range(self.values.count):
            _fill(self._peer, self.values.place(at))

    def close(self) -> None:
        self._peer.close()


def _fill(peer: socket.socket, buffer: memoryview) -> None:
    at = 0
    while at < len(buffer):
        got = peer.recv_into(buffer[at:])
        if not got:
            raise ConnectionError("the other end is gone")
        at += got


def serve(total_bytes: int) -> None:
    """Answer on a port, which is printed first, until the process is ended; a thread and `total_bytes` of memory a client."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        peer, _ = listener.accept()
        threading.Thread(target=_answer, args=(peer, memoryview(np.ones(total_bytes, np.uint8))), daemon=True).start()


def _answer(peer: socket.socket, memory: memoryview) -> None:
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    request = memoryview(bytearray(_REQUEST.size))
    while True:
        try:
            _fill(peer, request)
        except ConnectionError:
            return
        operation, count, size = _REQUEST.unpack(request)
        for at in range(count):
            place = memory[at * size : (at + 1) * size]
            if operation == b"g":
                peer.sendall(place)
            else:
                _fill(peer, place)
        if operation == b"p":
            peer.sendall(_DONE)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
