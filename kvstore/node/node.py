"""A store node: puts the parts together, keeps them going, and takes them down in order."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import replace

from kvstore import eviction
from kvstore.arena import (
    AccountingError,
    Arena,
    PageAllocator,
    allow_open_files,
    create,
    give_freed_memory_back,
    host_identity,
    keep_freed_memory,
    settle_objects,
)
from kvstore.clock import Clock, SystemClock
from kvstore.credentials import Credentials
from kvstore.metadata import IndexEntry, InprocMetadata, Metadata, NodeRecord, connect
from kvstore.metadata.reconcile import Reconciler
from kvstore.metrics import Metrics

from .announce import Announcer
from .config import NodeConfig
from .copier import Copier
from .door import DoorServer
from .engine import NodeEngine
from .exposition import MetricsPage, NodeMetrics
from .handlers.base import Service
from .pressure import ClusterOrder
from .server import Server
from .spill import Spill, spill_levels
from .table import Entry

log = logging.getLogger(__name__)

#: How often leases and pins that are over are ended, and the account is checked if nothing is going on.
SWEEP_S = 0.25
#: The account is verified when so many sweeps in a row saw no change: page by page where that takes less than about 0.1 s.
IDLE_SWEEPS = 4
DEEP_CHECK_BLOCKS = 20_000


class StoreNode:
    """One arena and its service.

    Parameters
    ----------
    config : NodeConfig
    metadata : Metadata, optional
        By default what `config.redis` names, or none at all.
    clock : Clock, optional
    metrics : Metrics, optional
        A registry of its own by default.
    server : callable, optional
        Makes what serves the node's handlers; a simulation passes one that needs no sockets.
    on_idle : callable, optional
        Called in a thread after each burst of work, when no block has been asked for, come or gone for a second.

    `start` acts and `stop` undoes; a node is started once. `failed` is set when its account does not add up: it is not to be trusted
    then, and takes no more blocks.
    """

    def __init__(
        self,
        config: NodeConfig,
        metadata: Metadata | None = None,
        clock: Clock | None = None,
        metrics: Metrics | None = None,
        server: Callable[[NodeConfig, Service, Clock], Server] = Server,
        on_idle: Callable[[], object] | None = None,
    ) -> None:
        self.config = config
        self.clock = clock or SystemClock()
        self.metrics = metrics or Metrics()
        self.failed = asyncio.Event()
        self._drained_at = 0.0
        self._given_metadata = metadata
        self._make_server = server
        self._on_idle = on_idle
        self._parts = AsyncExitStack()

    @property
    def address(self) -> str:
        """``host:port`` of the gRPC service."""
        return self.service.record.address

    @property
    def record(self) -> NodeRecord:
        """The node's account of itself, as of now."""
        return replace(self.service.record, used_bytes=self.engine.used_bytes, blocks=len(self.engine.table))

    async def start(self) -> None:
        """Take the arena, serve, and join the cluster.

        Raises
        ------
        ConfigError
            When the arena does not fit, an address is taken, or the policy, device or metadata URL is unknown.
        """
        async with AsyncExitStack() as stack:  # a start that fails half-way leaves nothing behind
            await self._start(stack)
            self._parts = stack.pop_all()

    async def _start(self, stack: AsyncExitStack) -> None:
        config, clock = self.config, self.clock
        policy = eviction.create_online(config.policy)
        metadata = self._given_metadata
        if metadata is None:
            metadata = connect(config.redis, config.prefix) if config.redis else InprocMetadata(clock)
            stack.push_async_callback(metadata.close)
        self.arena: Arena = create(config.arena, config.device, config.page_bytes)
        stack.callback(self.arena.close)
        copier = Copier(self.arena)
        stack.callback(copier.close)
        self.spill = Spill(spill_levels(config, clock, self._changed), self._payload)
        stack.push_async_callback(self.spill.stop)
        pages = PageAllocator(self.arena.pages)
        self.engine = NodeEngine(config, clock, policy, pages, self._changed, self.spill, self.arena.marks)
        stack.push_async_callback(self._drain_into_spill)
        credentials = Credentials.load(config.credentials)
        self.service = Service(self.engine, self.arena, copier, self.metrics, self._identity(), self.spill, credentials)
        order = ClusterOrder(self.engine, metadata, self.service.record.incarnation, config.heartbeat_s)
        self._announcer = Announcer(metadata, lambda: order.sign(self.record), self._describe, self._keys, config.heartbeat_s)
        metrics = None
        if config.metrics:
            page = MetricsPage(NodeMetrics(self.metrics, self.engine, self.service.record.id, self.spill))
            stack.push_async_callback(page.stop)
            metrics = f"{_reachable(config.metrics)}:{await page.start(config.metrics)}"
        self._server = self._make_server(config, self.service, clock)
        port = await self._server.start(config.listen)
        stack.push_async_callback(self._stop_server)
        address = f"{config.advertise or _reachable(config.listen)}:{port}"
        self.service.record = replace(self.service.record, address=address, metrics=metrics)
        self._door = DoorServer(self.service)
        stack.push_async_callback(self._door.stop)
        self.service.record = replace(self.service.record, door=await self._door.start(config))
        await self._announcer.start()
        stack.push_async_callback(self._leave)
        self.spill.start()
        order.start()
        stack.push_async_callback(order.stop)
        reconciler = Reconciler(metadata, self.record.incarnation, clock)
        reconciler.start()
        stack.push_async_callback(reconciler.stop)
        sweeper = asyncio.create_task(self._sweep_on())
        stack.callback(sweeper.cancel)

    async def stop(self) -> None:
        """Drain, for at most `drain_s` and a half: take no more blocks, leave the cluster, let running reads finish, spill what the arena
        holds, give the memory back. Safe to call twice.
        """
        self.service.admitting = False
        self._drained_at = self.clock.now() + self.config.drain_s
        await self._server.drain()
        await self._parts.aclose()

    def _left_s(self) -> float:
        """What is left of the time to drain; a moment, when it is over."""
        return max(self._drained_at - self.clock.now(), self.config.drain_s / 4)

    async def _leave(self) -> None:
        await self._announcer.stop(self._left_s() / 2)

    async def _stop_server(self) -> None:
        await self._server.stop(self._left_s())

    async def _drain_into_spill(self) -> None:
        """Keep what the arena holds for the next incarnation, oldest first, as far as there is time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._left_s()):
                await self.spill.drain(sorted(self.engine.table, key=lambda entry: entry.last_use))

    def _identity(self) -> NodeRecord:
        rng = self.clock.rng
        return NodeRecord(
            id=self.config.id or f"node-{rng.getrandbits(32):08x}",
            incarnation=f"{rng.getrandbits(64):016x}",
            address="",
            pid=os.getpid(),
            device=self.arena.device,
            arena_bytes=self.arena.size_bytes,
            host=host_identity(),
            started=self.clock.wall(),
        )

    def _changed(self, key: bytes) -> None:
        self._announcer.touch(key)

    def _describe(self, key: bytes) -> IndexEntry | None:
        """The block of `key` that a reader would get: of the arena, unless a tier behind it has more of it."""
        found = [IndexEntry(key, entry.header.total_bytes, entry.header.present) for entry in self.engine.table.named(key)]
        found += [IndexEntry(key, spilled.block_bytes, spilled.fidelity) for _, spilled in self.spill.named(key)]
        return max(found, key=lambda entry: entry.fidelity, default=None)

    def _keys(self) -> list[bytes]:
        return list(dict.fromkeys([*(entry.key for entry in self.engine.table), *(spilled.key for _, spilled in self.spill)]))

    def _payload(self, entry: Entry) -> list[bytes]:
        """A resident block's layers, copied out of the arena."""
        rows = entry.header.rows[: entry.header.present]
        return [b"".join(self.arena.read(extents, 0, row.size_bytes)) for extents, row in zip(entry.layers, rows, strict=True)]

    async def _sweep_on(self) -> None:
        """End what is over, and verify the account once after each burst of work."""
        quiet, before = 0, None
        while True:
            await asyncio.sleep(SWEEP_S)
            self.engine.holds.expire()
            state = (self.engine.changes, self.engine.requests.count)
            quiet = quiet + 1 if state == before else 0
            before = state
            if quiet == IDLE_SWEEPS and not self.failed.is_set():
                self._verify()
                self._door.relax()
                if self._on_idle:
                    await asyncio.to_thread(self._on_idle)

    def _verify(self) -> None:
        try:
            self.engine.check_sums()
            if len(self.engine.table) <= DEEP_CHECK_BLOCKS:
                self.engine.check()
            if len(self.spill) <= DEEP_CHECK_BLOCKS:
                self.spill.check()
        except AccountingError:
            log.critical("the account of memory does not add up; this node must end", exc_info=True)
            self.service.admitting = False
            self.failed.set()


def _reachable(listen: str) -> str:
    """The host by which others reach what listens there: this machine's address where all interfaces were meant."""
    host = listen.rpartition(":")[0]
    if host not in ("0.0.0.0", "[::]"):
        return host
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def run(config: NodeConfig) -> int:
    """Run a node until SIGTERM or SIGINT, or until it fails. Prints one JSON line when it is ready. Returns the exit code."""
    keep_freed_memory()
    allow_open_files()
    return asyncio.run(_run(config))


async def _run(config: NodeConfig) -> int:
    def tidy() -> None:
        if len(node.engine.table) <= DEEP_CHECK_BLOCKS:
            gc.collect()  # what calls leave in cycles else lies between what is in use, a quarter as many objects again
        give_freed_memory_back()

    node = StoreNode(config, on_idle=tidy)
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    await node.start()
    settle_objects()
    record = node.record
    ready = {"ready": True, "id": record.id, "address": record.address, "metrics": record.metrics, "door": record.door}
    print(json.dumps(ready | {"incarnation": record.incarnation, "pid": record.pid, "device": record.device}), flush=True)
    waits = [asyncio.create_task(event.wait()) for event in (ended, node.failed)]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    log.info("draining")
    await node.stop()
    return int(node.failed.is_set())
