"""One way through a node's door (`kvstore.door`): blocking calls, from one thread at a time.

On the node's own host the blocks are copied out of its shared memory, elsewhere they come over the connection. Nothing is handed on
before it is known, after the copy, that the bytes were the block's to the end, and before its CRCs have been compared.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from crc32c import crc32c

from kvstore import door
from kvstore.arena import is_own_user
from kvstore.arena.catalogue import Catalogue
from kvstore.block import BlockHeader, EncodedBlock
from kvstore.door import Kind
from kvstore.errors import CorruptBlockError, TransportError
from kvstore.metadata import NodeRecord

from .buffers import Buffers, Carver
from .line import Line, map_memory, receive_memory
from .planned import OK, Copied, Plan
from .shared import DeviceMemory, SharedMemory
from .staging import Stage

log = logging.getLogger(__name__)

#: Bytes of blocks asked for at once: few at first, so that the caller can begin, then more.
FIRST_BATCH_BYTES, BATCH_GROWTH, LAST_BATCH_BYTES = 8 << 20, 4, 32 << 20
MAX_BATCH_KEYS = 512
#: So little is copied in the caller's thread, in about a millisecond: to wake another for it and to be woken takes as long.
AT_ONCE_BYTES = 6 << 20
#: Blocks whose headers are looked at there, and which the connection takes without waiting for the node.
AT_ONCE_BLOCKS = 128
#: Reads by the catalogue that the node has not been told of; older ones are forgotten.
MAX_UNTOLD = 64
#: Batches asked for at first: the node plans the next one while one is copied.
AHEAD = 2
#: Blocks are sent together, and handed on together, up to here.
TOGETHER_BYTES = 1 << 20

#: Looks at headers, those of block `number` and of the next ones, before memory is set aside: how many leading ones may be read. What is
#: not accepted ends the reading. Raises CorruptBlockError where the first is not the block that was asked for.
Accept = Callable[[int, Sequence[BlockHeader]], int]
#: Takes verified blocks, by number.
Take = Callable[[list[tuple[int, EncodedBlock]]], None]


class Door(Line):
    """An open connection. Made by `open_door`.

    Parameters
    ----------
    peer : socket
        That has been welcomed.
    arena : SharedMemory, optional
        The node's memory, where it shares it; it may be set to another map of the same memory.
    """

    def __init__(self, peer: socket.socket, arena: SharedMemory | None) -> None:
        super().__init__(peer)
        self.arena = arena
        self._stage: Stage | None = None
        self._asked = False
        self._batches: list[tuple[int, int]] = []  # of what was asked for
        self._untold: list[bytes] = []

    def find(self, keys: Sequence[bytes], tokens: int, buffers: Buffers) -> list[EncodedBlock]:
        """Copy whole blocks by the node's catalogue, without asking it: all of them, or none."""
        try:
            plan = self.arena.planned(keys) if self.arena is not None else None
            if plan is None or plan.size_bytes > AT_ONCE_BYTES:
                return []
            blocks, _ = plan.copy(self.arena, buffers).sound(len(keys), "")
        except CorruptBlockError:  # a row that is half written says anything
            return []
        if len(blocks) < len(keys):
            return []
        self.arena.remember(keys, plan)
        self._untold = [*self._untold[1 - MAX_UNTOLD :], door.message(Kind.USED, door.NUMBER.pack(tokens), *keys)]
        return blocks

    def tell(self) -> None:
        """Tell the node what was read without asking it, while nothing else uses the connection.

        Nothing is waited for: a node that does not listen now is told after a later read, and knows a little less for its policy.
        """
        while self._untold and self.open and self.send_now(self._untold[0]):
            del self._untold[0]

    def ask(self, keys: Sequence[bytes], sizes: Sequence[int], tokens: int, timeout_s: float, section: int | None = None) -> None:
        """Send what the next call of `read`, which is to have the same arguments, begins with."""
        self.deadline = time.monotonic() + timeout_s
        said = door.NUMBER.pack(tokens)
        if section is not None:
            self.send([door.message(Kind.SECTION, bytes((section,)), said, *keys)])
        elif self.arena is None:
            self.send([door.message(Kind.GET, said, *keys)])
        else:
            self._batches = list(_batches(sizes))
            self.send([self._plan(keys, said, batch) for batch in self._batches[:AHEAD]])
        self._asked = True

    def reads_at_once(self, sizes: Sequence[int]) -> bool:
        """Whether `read` has little to do for whole blocks, once the node has answered."""
        return self.arena is not None and not self.arena.is_device and is_little(sizes)

    def read(
        self, keys: Sequence[bytes], sizes: Sequence[int], tokens: int, accept: Accept, take: Take, buffers: Buffers, timeout_s: float,
        section: int | None = None, begun: Sequence[EncodedBlock | None] = (),
    ) -> int:  # fmt: skip
        """Read blocks in order until one is not there or not accepted.

        Parameters
        ----------
        sizes : sequence of int
            About how large each block is.
        tokens : int
            Length of the prompt, for the node's policy.
        section : int, optional
            Read a section of each block alone, over the connection; a block without sections comes whole as the first.
        begun : sequence of EncodedBlock
            The blocks that further sections belong to.

        Returns
        -------
        int
            How many were taken.

        Raises
        ------
        CorruptBlockError
            For bytes that do not certify themselves; the blocks before it have been taken.
        """
        if not self._asked:
            self.ask(keys, sizes, tokens, timeout_s, section)
        self._asked = False
        if self.arena is None or section is not None:
            return self._read_blocks(section, begun or [None] * len(keys), accept, take, Carver(buffers))
        return self._read_shared(keys, door.NUMBER.pack(tokens), accept, take, buffers)

    def begin(self, blocks: Sequence[tuple[EncodedBlock, int]], timeout_s: float) -> bool:
        """Write what the next call of `write`, with the same arguments, begins with, if that takes little time and waits for nothing.

        True where that is all, so that `write` only waits for the node.
        """
        if self._stage is None or not self._stage.open or not is_little([block.header.payload_bytes for block, _ in blocks]):
            return False
        self.deadline = time.monotonic() + timeout_s
        return self._stage.begin(self, blocks)

    def write(self, blocks: Sequence[tuple[EncodedBlock, int]], timeout_s: float) -> bytes:
        """Put blocks, each with the length of its prompt. Returns a `BlockStatus` for each."""
        self.deadline = time.monotonic() + timeout_s
        if self._stage is None and self._peer.family == socket.AF_UNIX:
            self._stage = Stage.ask(self)
        staged = self._stage is not None and self._stage.open
        statuses = self._stage.write(self, blocks) if staged else self._write_stream(blocks)
        if len(statuses) != len(blocks):
            raise TransportError(f"a node answered {len(statuses)} of {len(blocks)} blocks")
        return statuses

    def _write_stream(self, blocks: Sequence[tuple[EncodedBlock, int]]) -> bytes:
        parts, size = [], 0
        for block, tokens in blocks:
            parts += (door.message(Kind.PUT, door.NUMBER.pack(tokens), block.header.to_bytes()), *block.payload)
            size += block.header.payload_bytes
            if size >= TOGETHER_BYTES:
                self.send(parts)
                parts, size = [], 0
        self.send([*parts, door.message(Kind.END)])
        return bytes(self.receive(Kind.STATUSES))

    # ---- shared memory

    def _read_shared(self, keys: Sequence[bytes], tokens: bytes, accept: Accept, take: Take, buffers: Buffers) -> int:
        batches, taken = self._batches, 0
        for number, (first, stop) in enumerate(batches):
            copied, damage, answer = self._copy_all(keys[first:stop], first, accept, buffers)
            take(list(enumerate(copied, first)))
            taken += len(copied)
            done = door.message(Kind.DONE, bytes(answer[: door.NUMBER.size]))
            self.send([done, *(self._plan(keys, tokens, batch) for batch in batches[number + AHEAD : number + AHEAD + 1])])
            if taken < stop:
                if number + 1 < len(batches):
                    self.close()  # the next plan is not wanted
                if damage:
                    raise CorruptBlockError(damage)
                break
        return taken

    @staticmethod
    def _plan(keys: Sequence[bytes], tokens: bytes, batch: tuple[int, int]) -> bytes:
        return door.message(Kind.PLAN, tokens, *keys[batch[0] : batch[1]])

    def _guess(self, keys: Sequence[bytes], buffers: Buffers) -> tuple[Plan, Copied] | None:
        plan = self.arena.guess(keys)
        return None if plan is None else (plan, plan.copy(self.arena, buffers))

    def _copy_all(
        self, keys: Sequence[bytes], first: int, accept: Accept, buffers: Buffers
    ) -> tuple[list[EncodedBlock], str, memoryview]:
        """The leading blocks that are there, accepted and, once copied, still theirs; what is wrong with a damaged next; the node's plan.

        They are copied as they lay the last time while the node answers; if it says otherwise, once more.
        """
        plan, copied = self._guess(keys, buffers) or (None, None)
        answer = self.receive(Kind.PLANNED)
        said = bytes(answer[door.NUMBER.size :])
        if plan is None or plan.said != said:
            plan, copied = Plan(said, len(keys), self.arena), None
        count, damage = 0, ""
        try:
            while accepted := accept(first + count, plan.headers[count:]):
                count += accepted
            if count == len(plan.headers):
                damage = plan.damage
        except CorruptBlockError as error:
            damage = str(error)
        if copied is None:
            wanted = plan if count == len(plan.headers) else Plan(said, count, self.arena)
            copied = wanted.copy(self.arena, buffers)
        blocks, damage = copied.sound(count, damage)
        if len(blocks) == len(keys):
            self.arena.remember(keys, plan)
        return blocks, damage, answer

    # ---- over the connection

    def _read_blocks(self, section: int | None, blocks: Sequence[EncodedBlock | None], accept: Accept, take: Take, memory: Carver) -> int:
        with _Taken(take) as taken:
            for number, begun in enumerate(blocks):
                block = self._read_block(number, section, begun, accept, memory)
                if block is None:
                    return number
                taken.add(number, block)
        return len(blocks)

    def _read_block(
        self, number: int, section: int | None, block: EncodedBlock | None, accept: Accept, memory: Carver
    ) -> EncodedBlock | None:
        """The next block of a stream, or a section of it, of `block` where that is not the first.

        None, and the connection is closed, where it is not there, not accepted, or was lost on the way.
        """
        answer = self.receive(Kind.BLOCK)
        if answer and answer[0] == OK:
            header = BlockHeader.from_bytes(answer[1:])
            if block is None and accept(number, [header]):
                block = EncodedBlock(header, (memory.take(header.payload_bytes)[0],))
            if block is not None and header == block.header:  # else another took its place
                (part,), mark = block.payload if section is None else block.section(section), memoryview(bytearray(1))
                self.fill(part)
                self.fill(mark)
                if mark == door.INTACT:
                    return self._verified(block, section, part)
        self.close()  # what is still to come on it is not wanted
        return None

    @staticmethod
    def _verified(block: EncodedBlock, section: int | None, part: memoryview) -> EncodedBlock:
        if section is None or not block.header.sections:
            return EncodedBlock.verify(block.header, part)
        block.header.check_section(section, crc32c(part))
        return block


class _Taken:
    """Blocks on their way to `take`, several at once: to wake the caller for each small one costs more than its bytes."""

    def __init__(self, take: Take) -> None:
        self._take = take
        self._blocks: list[tuple[int, EncodedBlock]] = []
        self._size = 0

    def __enter__(self) -> _Taken:
        return self

    def __exit__(self, *_: object) -> None:
        self._hand_on()

    def add(self, number: int, block: EncodedBlock) -> None:
        """One more."""
        self._blocks.append((number, block))
        self._size += block.header.payload_bytes
        if self._size >= TOGETHER_BYTES:
            self._hand_on()

    def _hand_on(self) -> None:
        if self._blocks:
            self._take(self._blocks)
        self._blocks, self._size = [], 0


def is_little(sizes: Sequence[int]) -> bool:
    """Whether blocks of these sizes are so few and small that the caller's own thread copies them."""
    return len(sizes) <= AT_ONCE_BLOCKS and sum(sizes) <= AT_ONCE_BYTES


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
            if not is_own_user(peer):
                raise TransportError("the node's door is kept by another user")
        else:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.sendall(door.message(Kind.HELLO, token.encode()))
        size_bytes, descriptor, remote = receive_memory(peer, Kind.WELCOME)
        arena = None
        if descriptor is not None:
            mapped = map_memory(descriptor, size_bytes, writable=False)
            arena = _of_gpu(mapped, remote) if remote else SharedMemory(mapped, _listed(peer))
        peer.settimeout(None)
        return Door(peer, arena)
    except BaseException:
        peer.close()
        raise


def _listed(peer: socket.socket) -> Catalogue:
    size_bytes, descriptor, _ = receive_memory(peer, Kind.LISTED)
    if descriptor is None:
        raise TransportError("the node's memory has no catalogue")
    return Catalogue(map_memory(descriptor, size_bytes, writable=False))


def _of_gpu(mapped: np.ndarray, remote: bytes) -> SharedMemory | None:
    """The node's memory; None where this process does not use that GPU: blocks come over the connection then."""
    from kvstore.arena.cuda import can_attach

    try:
        return DeviceMemory(mapped, remote) if can_attach() else None
    except TransportError as error:
        log.info("blocks come over the connection: %s", error)
        return None


def _batches(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of blocks to ask for at once."""
    limit, first, size = FIRST_BATCH_BYTES, 0, 0
    for at, more in enumerate(sizes):
        if at > first and (size + more > limit or at - first == MAX_BATCH_KEYS):
            yield first, at
            first, size, limit = at, 0, min(BATCH_GROWTH * limit, LAST_BATCH_BYTES)
        size += more
    yield first, len(sizes)
