"""One way through a node's door (`kvstore.door`): blocking calls, from one thread at a time.

On the node's own host the blocks are copied out of its shared memory, elsewhere they come over the connection. Nothing is handed on
before the node has said, after the copy, that the bytes were the block's to the end, and before its CRCs have been compared.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from crc32c import crc32c

from kvstore import door
from kvstore.block import BlockHeader, EncodedBlock
from kvstore.door import Kind
from kvstore.errors import CorruptBlockError, TransportError
from kvstore.metadata import NodeRecord

from .buffers import Buffers, Carver

#: Bytes copied and then checked while the processor's cache still holds them.
PIECE_BYTES = 256 << 10
#: Bytes of blocks asked for at once: few at first, so that the caller can begin, then more.
FIRST_BATCH_BYTES, LAST_BATCH_BYTES = 8 << 20, 32 << 20
MAX_BATCH_KEYS = 512
#: Blocks are sent together up to here, and messages are received together up to there.
SENT_BYTES, RECEIVED_BYTES = 1 << 20, 64 << 10
MAX_IOV = 512
MAPPED_AT_ONCE_BYTES = 4 << 30
OK = 1
_PEER = struct.Struct("3i")
_TIME = struct.Struct("@qq")  # seconds, microseconds

#: Looks at a header before memory is set aside; False ends the reading.
Accept = Callable[[int, BlockHeader], bool]
#: Takes verified blocks, by number.
Take = Callable[[list[tuple[int, EncodedBlock]]], None]


class Door:
    """An open connection. Made by `open_door`; every method raises OSError or TransportError when the node is gone or late."""

    def __init__(self, peer: socket.socket, arena: np.ndarray | None) -> None:
        self.arena = arena
        self._peer = peer
        self._deadline = 0.0
        self._inbox = memoryview(bytearray(RECEIVED_BYTES))
        self._start = self._stop = 0

    @property
    def open(self) -> bool:
        """Whether it can be used again."""
        return self._peer.fileno() >= 0

    def close(self) -> None:
        """End the connection. Safe to call twice."""
        self._peer.close()

    def read(
        self, keys: Sequence[bytes], sizes: Sequence[int], tokens: int, accept: Accept, take: Take, buffers: Buffers, timeout_s: float
    ) -> int:
        """Read blocks in order until one is not there or not accepted.

        Parameters
        ----------
        sizes : sequence of int
            About how large each block is.
        tokens : int
            Length of the prompt, for the node's policy.

        Returns
        -------
        int
            How many were taken.

        Raises
        ------
        CorruptBlockError
            For bytes that do not certify themselves; the blocks before it have been taken.
        """
        self._deadline = time.monotonic() + timeout_s
        way = self._read_stream if self.arena is None else self._read_shared
        return way(keys, sizes, door.NUMBER.pack(tokens), accept, take, Carver(buffers))

    def write(self, blocks: Sequence[tuple[EncodedBlock, int]], timeout_s: float) -> bytes:
        """Put blocks, each with the length of its prompt. Returns a `BlockStatus` for each."""
        self._deadline = time.monotonic() + timeout_s
        parts, size = [], 0
        for block, tokens in blocks:
            parts += (door.message(Kind.PUT, door.NUMBER.pack(tokens), block.header.to_bytes()), *block.payload)
            size += block.header.payload_bytes
            if size >= SENT_BYTES:
                self._send(parts)
                parts, size = [], 0
        self._send([*parts, door.message(Kind.END)])
        statuses = bytes(self._receive(Kind.STATUSES))
        if len(statuses) != len(blocks):
            raise TransportError(f"a node answered {len(statuses)} of {len(blocks)} blocks")
        return statuses

    # ---- shared memory

    def _read_shared(self, keys: Sequence[bytes], sizes: Sequence[int], tokens: bytes, accept: Accept, take: Take, memory: Carver) -> int:
        batches = list(_batches(sizes))  # the node is asked for the next one while this one is copied
        self._send([self._ask(keys, tokens, batch) for batch in batches[:2]])
        copied: list[tuple[int, EncodedBlock]] = []
        taken, damage = 0, ""
        for number, (first, stop) in enumerate(batches):
            answer = self._receive(Kind.PLANNED)
            before, (copied, damage) = copied, self._copy_all(first, stop, answer, accept, memory)
            done = door.message(Kind.DONE, bytes(answer[: door.NUMBER.size]))
            self._send([done, *(self._ask(keys, tokens, batch) for batch in batches[number + 2 : number + 3])])
            if number:
                taken += self._confirm(before, take)
            whole = taken + len(copied) == stop
            if not whole or number + 1 == len(batches):
                break
        if taken == first:
            taken += self._confirm(copied, take, behind=number + 1 < len(batches))
        if taken < len(keys):
            self.close()  # what is still to come on it is not wanted
        if damage and taken == first + len(copied):
            raise CorruptBlockError(damage)
        return taken

    @staticmethod
    def _ask(keys: Sequence[bytes], tokens: bytes, batch: tuple[int, int]) -> bytes:
        return door.message(Kind.PLAN, tokens, *keys[batch[0] : batch[1]])

    def _confirm(self, copied: list[tuple[int, EncodedBlock]], take: Take, behind: bool = False) -> int:
        """Hand on the leading blocks that were still theirs when they had been copied. Returns their number.

        `behind` says that the answer comes after that to a later plan, which is not wanted any more.
        """
        if behind:
            self._receive(Kind.PLANNED)
        sound = _leading(bytes(self._receive(Kind.INTACT)), len(copied))
        take(copied[:sound])
        return sound

    def _copy_all(
        self, first: int, stop: int, answer: memoryview, accept: Accept, memory: Carver
    ) -> tuple[list[tuple[int, EncodedBlock]], str]:
        """The leading blocks of a plan that are there and accepted, and what is wrong with the next one, if it is damaged."""
        copied: list[tuple[int, EncodedBlock]] = []
        try:
            for number, (header_bytes, runs) in enumerate(_parse_plan(answer, stop - first), first):
                header = BlockHeader.from_bytes(header_bytes)
                if not accept(number, header):
                    break
                copied.append((number, self._copy(header, iter(runs), memory)))
        except CorruptBlockError as error:
            return copied, str(error)
        return copied, ""

    def _copy(self, header: BlockHeader, runs: Iterator[tuple[int, int]], memory: Carver) -> EncodedBlock:
        """One block out of the arena, every layer's CRC compared."""
        if not header.payload_bytes:
            raise CorruptBlockError("a block without payload came through the door")
        arena, view = self.arena, memory.take(header.payload_bytes)
        whole, at, parts = np.frombuffer(view, np.uint8), 0, []
        for number, row in enumerate(header.rows[: header.present], 1):
            start, crc = at, 0
            while at - start < row.size_bytes:
                offset, left = next(runs, (0, 0))
                if not left or at - start + left > row.size_bytes or offset + left > len(arena):
                    raise CorruptBlockError("a plan of the door does not fit its block")
                while left:
                    size = min(left, PIECE_BYTES)
                    whole[at : at + size] = arena[offset : offset + size]
                    crc = crc32c(view[at : at + size], crc)
                    at, offset, left = at + size, offset + size, left - size
            if crc != row.crc32c:
                raise CorruptBlockError(f"the CRC-32C of fidelity layer {number} does not match")
            parts.append(view[start:at])
        return EncodedBlock(header, tuple(parts))

    # ---- over the connection

    def _read_stream(self, keys: Sequence[bytes], sizes: Sequence[int], tokens: bytes, accept: Accept, take: Take, memory: Carver) -> int:
        self._send([door.message(Kind.GET, tokens, *keys)])
        for number in range(len(keys)):
            answer = self._receive(Kind.BLOCK)
            if not answer or answer[0] != OK:
                return self._leave(number)
            header = BlockHeader.from_bytes(answer[1:])
            if not accept(number, header):
                return self._leave(number)
            payload = memory.take(header.payload_bytes)
            self._fill(payload)
            mark = memoryview(bytearray(1))
            self._fill(mark)
            if mark != door.INTACT:
                return self._leave(number)
            take([(number, EncodedBlock.verify(header, payload))])
        return len(keys)

    def _leave(self, number: int) -> int:
        """Close the connection: what is still to come on it is not wanted."""
        self.close()
        return number

    # ---- bytes

    def _send(self, parts: Sequence[bytes | memoryview]) -> None:
        """Send all of `parts`; nothing is joined."""
        views = [memoryview(part).cast("B") for part in parts if len(part)]
        while views:
            self._patience(socket.SO_SNDTIMEO)
            sent = self._peer.sendmsg(views[:MAX_IOV])
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]

    def _receive(self, wanted: Kind) -> memoryview:
        frame = memoryview(bytearray(door.FRAME.size))
        self._fill(frame)
        kind, size = door.parse_frame(frame, door.MAX_ANSWER_BYTES)
        if kind is not wanted:
            raise TransportError(f"a node answered {kind.name} where {wanted.name} was due")
        body = memoryview(bytearray(size))
        self._fill(body)
        return body

    def _fill(self, buffer: memoryview) -> None:
        """Receive exactly `buffer`; what is small comes with what is behind it."""
        at = 0
        while at < len(buffer):
            if self._start < self._stop:
                size = min(len(buffer) - at, self._stop - self._start)
                buffer[at : at + size] = self._inbox[self._start : self._start + size]
                self._start, at = self._start + size, at + size
            elif len(buffer) - at >= RECEIVED_BYTES:
                at += self._receive_into(buffer[at:], socket.MSG_WAITALL)
            else:
                self._start, self._stop = 0, self._receive_into(self._inbox, 0)

    def _receive_into(self, buffer: memoryview, flags: int) -> int:
        self._patience(socket.SO_RCVTIMEO)
        got = self._peer.recv_into(buffer, 0, flags)
        if not got:
            raise ConnectionError("the connection has ended")
        return got

    def _patience(self, option: int) -> None:
        """Let the kernel end the next call at the deadline: a timeout of Python's own costs a system call more each time."""
        left_s = self._left_s()
        self._peer.setsockopt(socket.SOL_SOCKET, option, _TIME.pack(int(left_s), int(left_s % 1 * 1e6) + 1))

    def _left_s(self) -> float:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the deadline of the call has passed")
        return left_s


def open_door(node: NodeRecord, here: bool, token: str, timeout_s: float) -> Door:
    """Go in: by the Unix socket where the node is `here`, else by TCP.

    Raises
    ------
    OSError, TransportError
        When there is no door, or it stays shut: another user's, no credential, too many connections.
    """
    if here:
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(timeout_s)
    else:
        host, _, port = node.door.rpartition(":")
        peer = socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s)
    try:
        if here:
            peer.connect(door.local_name(node.incarnation))
            _check_user(peer)
        else:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.sendall(door.message(Kind.HELLO, token.encode()))
        arena = _welcome(peer)
        peer.settimeout(None)
        return Door(peer, arena)
    except BaseException:
        peer.close()
        raise


def _check_user(peer: socket.socket) -> None:
    """A name in the abstract namespace is anybody's: the one who listens must be of our own user."""
    _, uid, _ = _PEER.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    if uid != os.getuid():
        raise TransportError(f"the node's door is kept by user {uid}")


def _welcome(peer: socket.socket) -> np.ndarray | None:
    """The answer to HELLO; the arena, uint8 [bytes], if the node shares it.

    The pages of a small arena are mapped at once rather than each at its first touch, which halves the speed of the first copies.
    """
    size = door.FRAME.size + door.ARENA.size
    answer, descriptors, _, _ = socket.recv_fds(peer, size, 1) if peer.family == socket.AF_UNIX else (b"", [], 0, None)
    try:
        while len(answer) < size:
            more = peer.recv(size - len(answer))
            if not more:
                raise TransportError("the node's door stays shut")
            answer += more
        kind, _ = door.parse_frame(answer[: door.FRAME.size], door.ARENA.size)
        (arena_bytes,) = door.ARENA.unpack(answer[door.FRAME.size :])
        if kind is not Kind.WELCOME or bool(arena_bytes) != bool(descriptors):
            raise TransportError("the node's door did not welcome")
        if not arena_bytes:
            return None
        if os.fstat(descriptors[0]).st_size != arena_bytes:
            raise TransportError("the node's memory is not as large as it says")
        at_once = mmap.MAP_POPULATE if arena_bytes <= MAPPED_AT_ONCE_BYTES else 0
        return np.frombuffer(mmap.mmap(descriptors[0], arena_bytes, flags=mmap.MAP_SHARED | at_once, prot=mmap.PROT_READ), np.uint8)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _parse_plan(answer: memoryview, count: int) -> Iterator[tuple[memoryview, list[tuple[int, int]]]]:
    """Header and runs of each leading block of a plan that is there. Raises CorruptBlockError for a plan that is cut short."""
    at = door.NUMBER.size
    for _ in range(count):
        if at + door.PLANNED.size > len(answer):
            raise CorruptBlockError("a plan of the door is cut short")
        status, header_bytes, runs = door.PLANNED.unpack_from(answer, at)
        at += door.PLANNED.size
        stop = at + header_bytes + runs * door.RUN.size
        if stop > len(answer):
            raise CorruptBlockError("a plan of the door is cut short")
        if status != OK:
            return
        # A list: CPython 3.11 crashes when the collector meets an `iter_unpack` over a memoryview.
        yield answer[at : at + header_bytes], list(door.RUN.iter_unpack(bytes(answer[at + header_bytes : stop])))
        at = stop


def _batches(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of blocks to ask for at once."""
    limit, first, size = FIRST_BATCH_BYTES, 0, 0
    for at, more in enumerate(sizes):
        if at > first and (size + more > limit or at - first == MAX_BATCH_KEYS):
            yield first, at
            first, size, limit = at, 0, min(2 * limit, LAST_BATCH_BYTES)
        size += more
    yield first, len(sizes)


def _leading(marks: bytes, count: int) -> int:
    """How many of the first `count` marks are set before one is not."""
    lost = marks.find(door.LOST, 0, count)
    return min(count, len(marks)) if lost < 0 else lost
