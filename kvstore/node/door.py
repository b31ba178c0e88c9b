"""The node's side of the door (`kvstore.door`): who may come in, and what each request gets."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Sequence

from kvstore import door
from kvstore.arena import MARK_BYTES, is_own_user
from kvstore.arena.catalogue import Catalogue, create_catalogue
from kvstore.block import SECTIONS, Buffer
from kvstore.credentials import Caller
from kvstore.door import Kind
from kvstore.errors import ConcertinaError, ConfigError, TransportError
from kvstore.eviction.base import Request

from .config import NodeConfig
from .handlers.base import Service
from .handlers.put import Incoming
from .inbox import LARGE_BYTES, PIECE_S, SMALL_BYTES, Inbox
from .plans import Found
from .staging import STAGE_BYTES, Piece, Stage, Stages
from .status import Status
from .table import Entry
from .wire import PutFrame

log = logging.getLogger(__name__)

#: Connections served at one time; more are closed at once, and their clients use gRPC.
MAX_CONNECTIONS = 256
#: Seconds for a connection to show its credential.
HELLO_S = 2.0
#: Plans that one connection may have open.
MAX_PLANS = 4
#: Pieces of memory that one system call sends together.
MAX_PARTS = 512
_ABSENT = door.PLANNED.pack(Status.NOT_FOUND, 0, 0, 0, 0)


class DoorServer:
    """Listens on a Unix socket and, on the host of gRPC, on TCP.

    Parameters
    ----------
    service : Service
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tasks: set[asyncio.Task[None]] = set()
        self._guests: set[Guest] = set()
        self._stages = Stages()
        arena = service.arena
        reachable = arena.device == "cpu" or arena.remote is not None
        self._shared = os.open(f"/proc/self/fd/{arena.fd}", os.O_RDONLY) if reachable else -1
        self._listed, self._catalogue = create_catalogue(arena.size_bytes) if arena.device == "cpu" else (-1, None)

    async def start(self, config: NodeConfig) -> str:
        """Open the door, on TCP too unless gRPC is under TLS. Returns ``host:port`` of that side for others, empty without one.

        Raises
        ------
        ConfigError
            If a socket cannot be bound.
        """
        host = config.listen.rpartition(":")[0]
        try:
            local = socket.socket(socket.AF_UNIX)
            local.bind(door.local_name(self._service.record.incarnation))
            self._accept_on(local, is_own_user)
            if config.tls_cert:
                return ""
            remote = socket.create_server((host.strip("[]"), 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
            self._accept_on(remote, lambda peer: True)
            return f"{self._service.record.address.rpartition(':')[0]}:{remote.getsockname()[1]}"
        except OSError as error:
            raise ConfigError(f"cannot listen on {host} for bulk transfers: {error}; give --listen a host of this machine") from error

    async def stop(self) -> None:
        """Close everything."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for descriptor in (self._shared, self._listed):
            if descriptor >= 0:
                os.close(descriptor)
        self._shared = self._listed = -1

    def relax(self) -> None:
        """Nothing has happened for a while: give back memory that guests made necessary and that can be had again."""
        for guest in self._guests:
            guest.relax()

    def _accept_on(self, listener: socket.socket, admits) -> None:
        listener.listen(128)
        listener.setblocking(False)
        self._run(self._accept(listener, admits))

    def _run(self, work) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket, admits) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                try:
                    peer, _ = await loop.sock_accept(listener)
                except OSError as error:  # such as no descriptor left: others may end in a moment
                    log.warning("the door took no connection: %s", error)
                    await asyncio.sleep(0.1)
                    continue
                peer.setblocking(False)
                if len(self._tasks) > MAX_CONNECTIONS or not admits(peer):
                    peer.close()
                    continue
                if peer.family != socket.AF_UNIX:
                    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._run(self._serve(peer))

    async def _serve(self, peer: socket.socket) -> None:
        with peer:
            guest, inbox = None, Inbox(peer)
            try:
                async with asyncio.timeout(HELLO_S):
                    kind, body = await inbox.message()
                    if kind is not Kind.HELLO:
                        raise TransportError("the door is opened with HELLO")
                    token = bytes(body).decode("latin-1")
                    caller = self._service.credentials.caller([("authorization", f"Bearer {token}")] if token else [])
                    await self._welcome(peer, caller)
                guest = Guest(self._service, peer, inbox, caller, self._stages, self._catalogue)
                self._guests.add(guest)
                while True:
                    async with asyncio.timeout_at(guest.write_ends):
                        request = await inbox.message()
                    await guest.serve(*request)
                    del request  # its view keeps the memory that it lies in, however large, while the guest rests
            except (ConcertinaError, OSError, TimeoutError, struct.error) as error:
                log.debug("a guest of the door left: %s", error)
            finally:
                if guest is not None:
                    self._guests.discard(guest)
                    guest.leave()

    async def _welcome(self, peer: socket.socket, caller: Caller) -> None:
        # The memory holds everybody's blocks: one tenant among several may not see it.
        shared = self._shared >= 0 and peer.family == socket.AF_UNIX and caller.admin
        arena = self._service.arena
        remote = arena.remote.to_bytes() if shared and arena.remote is not None else b""
        answer = door.message(Kind.WELCOME, door.ARENA.pack(arena.shared_bytes if shared else 0), remote)
        if shared:
            socket.send_fds(peer, [answer], [self._shared])
            if self._catalogue is not None:
                size_bytes = os.fstat(self._listed).st_size
                socket.send_fds(peer, [door.message(Kind.LISTED, door.ARENA.pack(size_bytes))], [self._listed])
        else:
            await asyncio.get_running_loop().sock_sendall(peer, answer)


class Guest:
    """One connection that has been let in. `write_ends` is when what it writes must have ended; None while it writes nothing."""

    def __init__(
        self, service: Service, peer: socket.socket, inbox: Inbox, caller: Caller, stages: Stages, catalogue: Catalogue | None
    ) -> None:
        self._service = service
        self._catalogue = catalogue
        self._stages = stages
        self._stage: Stage | None = None
        self._offered: list[Piece] | None = None  # of which the payloads are on their way
        self._peer = peer
        self._inbox = inbox
        self._caller = caller
        self._plans: dict[int, int] = {}  # the lease of each
        self._number = 0
        self._incoming: Incoming | None = None
        self.write_ends: float | None = None
        self._waiting: list[Buffer] = []
        self._waiting_bytes = 0

    async def serve(self, kind: Kind, body: memoryview) -> None:
        """Answer one request. Raises TransportError for what is none."""
        if kind is Kind.PLAN:
            await self._plan(body)
        elif kind is Kind.DONE:
            self._service.engine.holds.release(self._plans.pop(*door.NUMBER.unpack(body), 0))
        elif kind is Kind.USED:
            self._service.engine.used(*self._look(body))
        elif kind is Kind.GET:
            await self._get(body)
        elif kind is Kind.SECTION and len(body) and body[0] < SECTIONS:
            await self._get(body[1:], body[0])
        elif kind is Kind.PUT:
            await self._put(body)
        elif kind is Kind.END:
            await self._end()
        elif kind is Kind.STAGE and self._peer.family == socket.AF_UNIX and self._stage is None:
            self._open_stage()
        elif kind is Kind.OFFER and self._stage is not None and self._offered is None and self._service.admitting:
            self._begin_writing()
            self._offered = self._stage.look(body)
        elif kind in (Kind.PART, Kind.FILLED) and self._stage is not None and self._offered is not None:
            offered, self._offered = self._offered, None
            await self._stage.take(offered, self._begin_writing())
            if kind is Kind.FILLED:
                await self._filled()
        else:
            raise TransportError(f"{kind.name} is no request now")

    def relax(self) -> None:
        """As `DoorServer.relax`."""
        if self._stage is not None:
            self._stage.relax()

    def leave(self) -> None:
        """Give up what the connection holds: leases, and a block that is not complete."""
        for lease in self._plans.values():
            self._service.engine.holds.release(lease)
        self._plans.clear()
        if self._incoming is not None:
            self._incoming.abandon()
        if self._stage is not None:
            self._stage.close()
            self._stage = None

    def _open_stage(self) -> None:
        self._stage = self._stages.open()
        size_bytes, descriptors = (0, []) if self._stage is None else (STAGE_BYTES, [self._stage.fd])
        socket.send_fds(self._peer, [door.message(Kind.STAGED, door.ARENA.pack(size_bytes))], descriptors)

    def _look(self, body: memoryview, section: int | None = None) -> tuple[list[Entry | None], Request | None]:
        """What there is of what is asked for, and whose use that is: none of its own where it is a further section."""
        (tokens,) = door.NUMBER.unpack_from(body)
        engine, ids = self._service.engine, self._service.ids(self._caller, door.split_keys(body[door.NUMBER.size :]))
        request = None if section else engine.reading(ids, tokens)
        entries, spill = engine.find(ids), self._service.spill
        if spill:  # what a tier has more of is for a Get call, which reads it there
            entries = [None if e is None or spill.has_better(id, e.header) else e for id, e in zip(ids, entries, strict=True)]
        return entries, request

    async def _plan(self, body: memoryview) -> None:
        if len(self._plans) >= MAX_PLANS:
            raise TransportError(f"a connection has at most {MAX_PLANS} plans open")
        entries, request = self._look(body)
        self._number += 1
        left = self._send_now([door.message(Kind.PLANNED, door.NUMBER.pack(self._number), *map(self._described, entries))])
        self._plans[self._number] = self._service.engine.lease(entries)  # while the guest copies
        self._service.engine.used(entries, request)
        await self._send(left)

    def _described(self, entry: Entry | None) -> bytes:
        """The header of a block and where in the arena its payload lies, as PLANNED says it."""
        if entry is None:
            return _ABSENT
        generation, described = entry.description
        if generation != entry.generation:
            arena, header = self._service.arena, entry.header.to_bytes()
            rows = zip(entry.header.rows, entry.layers, strict=False)
            runs = [door.RUN.pack(*run) for row, extents in rows for run in arena.pieces(extents, 0, row.size_bytes)]
            mark = arena.marks_at + entry.first_page * MARK_BYTES
            described = b"".join((door.PLANNED.pack(Status.OK, len(header), len(runs), mark, entry.generation), header, *runs))
            entry.description = entry.generation, described
            if self._catalogue is not None and not entry.owner:  # else its key means another block to each tenant
                self._catalogue.note(entry.key, described)
        return described

    async def _get(self, body: memoryview, section: int | None = None) -> None:
        entries, request = self._look(body, section)
        plan = [entry and Found.of(entry, 0) for entry in entries]
        lease = self._service.engine.lease(entries)
        try:
            for found in plan:
                if found is None or not self._service.engine.intact(found):
                    await self._send_later(door.message(Kind.BLOCK, bytes((Status.NOT_FOUND,))))
                else:
                    await self._stream(found, section)
            await self._flush()
        finally:
            if request is not None:
                self._service.engine.used(entries, request)
            self._service.engine.holds.release(lease)

    async def _stream(self, found: Found, section: int | None) -> None:
        """One block, or a section of it, and after its last byte whether all of them were its own.

        What waits to be sent together is the arena's own memory: nothing else runs until it has been sent, or copied.
        """
        await self._send_later(door.message(Kind.BLOCK, bytes((Status.OK,)), found.header.to_bytes()))
        begin, end = (0, found.header.payload_bytes) if section is None else found.header.section(section)
        for offset in range(begin, end, LARGE_BYTES):
            for piece in await self._service.copier.read(found.header, found.layers, offset, min(LARGE_BYTES, end - offset)):
                if end - begin <= SMALL_BYTES:
                    await self._send_later(piece)
                else:
                    await self._flush()
                    await self._send(piece)
        await self._send_later(door.INTACT if self._service.engine.intact(found) else door.LOST)

    async def _send_later(self, data: Buffer) -> None:
        """Send `data` together with what comes next."""
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        if self._waiting_bytes >= SMALL_BYTES or len(self._waiting) >= MAX_PARTS:
            await self._flush()

    async def _flush(self) -> None:
        if self._waiting:
            parts, self._waiting, self._waiting_bytes = self._waiting, [], 0
            await self._send(self._send_now(parts))

    async def _put(self, body: memoryview) -> None:
        if not self._service.admitting:
            raise TransportError("this node takes no more blocks")
        (tokens,) = door.NUMBER.unpack_from(body)
        header_bytes = memoryview(bytes(body[door.NUMBER.size :]))
        self._inbox.grow()
        incoming = self._begin_writing()
        index = incoming.next_index
        await incoming.take(PutFrame(index, header_bytes, header_bytes[:0], tokens))
        if incoming.header is None:
            raise TransportError("a block's header is damaged, and how much follows it is not known")
        left = incoming.header.payload_bytes
        async with asyncio.timeout_at(self.write_ends):
            while left:
                piece = await self._inbox.some(left)
                await incoming.take(PutFrame(index, None, piece, 0))
                left -= len(piece)

    async def _filled(self) -> None:
        incoming = self._begin_writing()
        outcome = incoming.pause()
        if not incoming.open:
            self._incoming = self.write_ends = None
        for entry in await self._tell(outcome, incoming):
            self._described(entry)  # now, when nobody waits for it, rather than at the first read

    def _begin_writing(self) -> Incoming:
        """What takes the blocks of the guest's write, which has a while to end from its beginning."""
        if self._incoming is None:
            self._incoming = Incoming(self._service, self._caller.tenant)
            self.write_ends = asyncio.get_running_loop().time() + self._service.engine.config.put_timeout_s
        return self._incoming

    async def _end(self) -> None:
        incoming, self._incoming, self.write_ends = self._incoming, None, None
        self._inbox.shrink()
        if incoming is None:
            await self._send(door.message(Kind.STATUSES))
            return
        await self._tell(incoming.pause(), incoming)

    async def _tell(self, outcome: Sequence[Status], incoming: Incoming) -> list[Entry]:
        """What became of blocks; and what nobody waits for, once that is on its way. Returns the blocks that can be seen since then."""
        try:
            left = self._send_now([door.message(Kind.STATUSES, bytes(outcome))])
        finally:
            entries = incoming.settle()
        await self._send(left)
        return entries

    def _send_now(self, parts: Sequence[Buffer]) -> bytes:
        """Send what goes out at once, and let the guest go on, should it wait for this processor. Returns a copy of the rest."""
        try:
            sent = self._peer.sendmsg(parts)
        except BlockingIOError:
            sent = 0
        rest = []
        for part in parts:
            if sent < len(part):
                rest.append(part[sent:])
            sent = max(sent - len(part), 0)
        os.sched_yield()
        return b"".join(rest)

    async def _send(self, data: Buffer) -> None:
        if not len(data):
            return
        async with asyncio.timeout(PIECE_S):
            await asyncio.get_running_loop().sock_sendall(self._peer, data)
