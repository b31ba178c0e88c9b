"""Whole messages over one connection of the door, by calls that block, but one, with one deadline for all of them."""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import select
import socket
import struct
import termios
import time
from collections.abc import Sequence

import numpy as np

from kvstore import door
from kvstore.door import Kind
from kvstore.errors import TransportError

#: Messages are received together up to here.
RECEIVED_BYTES = 256 << 10
#: So much goes to where it is wanted without a detour, with at most the beginning of what is behind it: a message and its header.
DIRECT_BYTES, BEHIND_BYTES = 32 << 10, 512
MAX_IOV = 512
#: An event loop itself waits so long for an answer, before it does other things meanwhile.
SOON_MS = 1
MAPPED_AT_ONCE_BYTES = 4 << 30
_TIME = struct.Struct("@qq")  # seconds, microseconds
_INT = struct.Struct("@i")


class Line:
    """An open connection; every method raises OSError or TransportError when the node is gone or late.

    Parameters
    ----------
    peer : socket
        In blocking mode; it belongs to this object.

    Attributes
    ----------
    deadline : float
        Until when calls may wait, on the monotonic clock; set it before the first.
    """

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer
        self.deadline = 0.0
        self._inbox = memoryview(bytearray(RECEIVED_BYTES))
        self._start = self._stop = 0

    @property
    def open(self) -> bool:
        """Whether it can be used again."""
        return self._peer.fileno() >= 0

    async def readable(self) -> bool:
        """Wait in the event loop, not in a thread, until the other end says something; whether that is a whole message (`has_message`).

        False, too, when it says nothing until the deadline. The loop itself stands still for the first `SOON_MS`: most answers come within
        that, and to be woken for one takes the loop a good part of it.
        """
        poll = select.poll()
        poll.register(self._peer, select.POLLIN)
        if poll.poll(SOON_MS):
            return self.has_message()
        loop, came, descriptor = asyncio.get_running_loop(), asyncio.Event(), self._peer.fileno()
        loop.add_reader(descriptor, came.set)
        try:
            async with asyncio.timeout(self.deadline - time.monotonic()):
                await came.wait()
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(descriptor)
            self._peer.setblocking(True)  # an event loop may have made it another one
        return self.has_message()

    def close(self) -> None:
        """End the connection. Safe to call twice."""
        self._peer.close()

    def send(self, parts: Sequence[bytes | memoryview]) -> None:
        """Send all of `parts`; nothing is joined."""
        views = [memoryview(part).cast("B") for part in parts if len(part)]
        while views:
            self._patience(socket.SO_SNDTIMEO)
            sent = self._peer.sendmsg(views[:MAX_IOV])
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]

    def send_now(self, message: bytes) -> bool:
        """Send a message, if nothing has to be waited for; else False. The connection is closed where it failed or part of it was sent."""
        try:
            sent = self._peer.send(message, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            sent = 0
        if sent < len(message):
            self.close()
        return sent == len(message)

    def receive_memory(self, wanted: Kind) -> tuple[int, int | None, bytes]:
        """See `receive_memory`; to be called while nothing else is due, since a descriptor comes with its own message alone."""
        self._patience(socket.SO_RCVTIMEO)
        return receive_memory(self._peer, wanted)

    def has_message(self) -> bool:
        """Whether the next message is here whole, so that `receive` would not wait; False where more than one may be."""
        if self._start < self._stop:
            return False
        try:
            frame = self._peer.recv(door.FRAME.size, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        if len(frame) < door.FRAME.size:
            return False
        _, size = door.parse_frame(frame, door.MAX_ANSWER_BYTES)
        (there,) = _INT.unpack(fcntl.ioctl(self._peer, termios.FIONREAD, bytes(_INT.size)))
        return there >= len(frame) + size

    def receive(self, wanted: Kind) -> memoryview:
        """The body of the next message. Raises TransportError for one of another kind."""
        frame = memoryview(bytearray(door.FRAME.size))
        self.fill(frame)
        kind, size = door.parse_frame(frame, door.MAX_ANSWER_BYTES)
        if kind is not wanted:
            raise TransportError(f"a node answered {kind.name} where {wanted.name} was due")
        body = memoryview(bytearray(size))
        self.fill(body)
        return body

    def fill(self, buffer: memoryview) -> None:
        """Receive exactly `buffer`; what is small comes with what is behind it."""
        at = 0
        while at < len(buffer):
            if self._start < self._stop:
                size = min(len(buffer) - at, self._stop - self._start)
                buffer[at : at + size] = self._inbox[self._start : self._start + size]
                self._start, at = self._start + size, at + size
            elif (left := len(buffer) - at) >= RECEIVED_BYTES:
                at += self._receive_into([buffer[at:]], socket.MSG_WAITALL)
            elif left >= DIRECT_BYTES:
                got = self._receive_into([buffer[at:], self._inbox[:BEHIND_BYTES]], 0)
                self._start, self._stop, at = 0, max(got - left, 0), at + min(got, left)
            else:
                self._start, self._stop = 0, self._receive_into([self._inbox], 0)

    def _receive_into(self, buffers: Sequence[memoryview], flags: int) -> int:
        self._patience(socket.SO_RCVTIMEO)
        got, _, _, _ = self._peer.recvmsg_into(buffers, 0, flags)
        if not got:
            raise ConnectionError("the connection has ended")
        return got

    def _patience(self, option: int) -> None:
        """Let the kernel end the next call at the deadline: a timeout of Python's own costs a system call more each time."""
        left_s = self._left_s()
        self._peer.setsockopt(socket.SOL_SOCKET, option, _TIME.pack(int(left_s), int(left_s % 1 * 1e6) + 1))

    def _left_s(self) -> float:
        left_s = self.deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the deadline of the call has passed")
        return left_s


def receive_memory(peer: socket.socket, wanted: Kind) -> tuple[int, int | None, bytes]:
    """A message that says how many bytes of memory the node shares, with the memory's descriptor, which is the caller's to close.

    Returns
    -------
    size_bytes : int
    descriptor : int or None
        None for no memory.
    remote : bytes
        What the node says of pages that are a GPU's; empty where they lie in that memory.

    Raises
    ------
    TransportError
        For any other message, or a size without a descriptor.
    """
    head = door.FRAME.size + door.ARENA.size
    answer, descriptors, _, _ = socket.recv_fds(peer, head, 1) if peer.family == socket.AF_UNIX else (b"", [], 0, None)
    try:
        answer = _receive_up_to(peer, answer, head)
        kind, body_bytes = door.parse_frame(answer[: door.FRAME.size], door.ARENA.size + door.MAX_REMOTE_BYTES)
        answer = _receive_up_to(peer, answer, door.FRAME.size + body_bytes)
        (size_bytes,) = door.ARENA.unpack(answer[door.FRAME.size : head])
        if kind is not wanted or bool(size_bytes) != bool(descriptors):
            raise TransportError(f"the node's door did not answer with {wanted.name}")
        if descriptors and os.fstat(descriptors[0]).st_size != size_bytes:
            raise TransportError("the node's memory is not as large as it says")
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise
    return size_bytes, descriptors[0] if descriptors else None, answer[head:]


def _receive_up_to(peer: socket.socket, answer: bytes, size: int) -> bytes:
    while len(answer) < size:
        more = peer.recv(size - len(answer))
        if not more:
            raise TransportError("the node's door stays shut")
        answer += more
    return answer


def map_memory(descriptor: int, size_bytes: int, writable: bool) -> np.ndarray:
    """Memory of the node as uint8 [bytes]; `descriptor` is closed.

    The pages of a small one are mapped at once rather than each at its first touch, which halves the speed of the first copies.
    """
    flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if size_bytes <= MAPPED_AT_ONCE_BYTES else 0)
    try:
        return np.frombuffer(mmap.mmap(descriptor, size_bytes, flags, mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)), np.uint8)
    finally:
        os.close(descriptor)
