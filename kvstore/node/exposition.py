"""The node's metrics: gauges set from one consistent account at the moment of the scrape, served over plain HTTP.

The page is made on the event loop, where the account cannot change half-way, so the exported bytes are exactly those of the pages.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from kvstore.codecs import PROFILE_WIRE_ID, name_of_wire_id
from kvstore.errors import ConfigError
from kvstore.metrics import Metrics

from .engine import NodeEngine
from .plans import Tally
from .spill import Level, Spill
from .spill.level import LevelTally

#: A scraper must have sent its request by then.
REQUEST_TIMEOUT_S = 5.0
MAX_REQUEST_BYTES = 16 << 10


class NodeMetrics:
    """Copies the engine's account into the metrics.

    Parameters
    ----------
    metrics : Metrics
    engine : NodeEngine
    node : str
        The node's id.
    spill : Spill, optional
    """

    def __init__(self, metrics: Metrics, engine: NodeEngine, node: str, spill: Spill | None = None) -> None:
        self.metrics = metrics
        self._engine = engine
        self._node = node
        self._spill = spill or Spill()
        self._told = Tally()
        self._told_spill: dict[str, LevelTally] = {}

    def refresh(self) -> None:
        """Set all gauges and advance all counters."""
        self._engine.holds.expire()
        self._set_gauges()
        self._advance_counters()
        for level in self._spill.levels:
            self._tell_of(level)

    def _set_gauges(self) -> None:
        metrics, engine, node = self.metrics, self._engine, self._node
        for state in ("used", "free", "reserved"):
            metrics.arena_bytes.labels(node=node, state=state).set(getattr(engine, f"{state}_bytes"))
        metrics.raw_bytes.labels(node=node).set(engine.table.raw_bytes)
        metrics.leases.labels(node=node).set(len(engine.holds.leases))
        for fidelity, count in engine.table.by_fidelity.items():
            metrics.blocks.labels(node=node, fidelity=str(fidelity)).set(count)
        stored: Counter[str] = Counter()
        for wire_id, size_bytes in engine.table.stored_by_codec.items():
            name = "profile" if wire_id == PROFILE_WIRE_ID else name_of_wire_id(wire_id)
            stored[name or "other"] += size_bytes
        for codec, size_bytes in stored.items():
            metrics.stored_bytes.labels(node=node, codec=codec).set(size_bytes)

    def _advance_counters(self) -> None:
        tally, told, node, policy = self._engine.tally, self._told, self._node, self._engine.policy.name
        for reason, count in (tally.evictions - told.evictions).items():
            self.metrics.evictions.labels(node=node, policy=policy, reason=reason).inc(count)
        for (before, after), count in (tally.demotions - told.demotions).items():
            self.metrics.demotions.labels(**{"node": node, "from": str(before), "to": str(after)}).inc(count)
        for reason, count in (tally.rejected - told.rejected).items():
            self.metrics.admissions_rejected.labels(node=node, reason=reason).inc(count)
        self._told = Tally(tally.evictions.copy(), tally.demotions.copy(), tally.rejected.copy())

    def _tell_of(self, level: Level) -> None:
        """A tier's gauges and counters."""
        place = {"node": self._node, "tier": level.tier.name}
        self.metrics.spill_bytes.labels(**place, state="used").set(level.used_bytes)
        self.metrics.spill_bytes.labels(**place, state="free").set(level.capacity_bytes - level.used_bytes)
        self.metrics.spilled_blocks.labels(**place).set(len(level.entries))
        tally, told = level.tally, self._told_spill.get(level.tier.name, LevelTally())
        self.metrics.spill_writes.labels(**place).inc(tally.stored - told.stored)
        self.metrics.spill_reads.labels(**place).inc(tally.read - told.read)
        self.metrics.corrupt_blocks.labels(where="spill").inc(tally.corrupt - told.corrupt)
        for reason, count in (tally.dropped - told.dropped).items():
            self.metrics.spill_dropped.labels(**place, reason=reason).inc(count)
        self._told_spill[level.tier.name] = replace(tally, dropped=tally.dropped.copy())


class MetricsPage:
    """``GET /metrics`` for Prometheus.

    Parameters
    ----------
    node_metrics : NodeMetrics
    """

    def __init__(self, node_metrics: NodeMetrics) -> None:
        self._node_metrics = node_metrics
        self._server: asyncio.Server | None = None

    async def start(self, listen: str) -> int:
        """Bind and serve; returns the port. Raises ConfigError if the address cannot be bound."""
        host, _, port = listen.rpartition(":")
        try:
            self._server = await asyncio.start_server(self._serve, host.strip("[]"), int(port), limit=MAX_REQUEST_BYTES)
        except OSError as error:
            raise ConfigError(f"cannot serve metrics on {listen}: {error}; give --metrics a free HOST:PORT, or port 0") from error
        return self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                request = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._answer(request))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return  # whoever asked is gone, slow, or speaks no HTTP
        finally:
            writer.close()

    def _answer(self, request: bytes) -> bytes:
        if not request.startswith((b"GET /metrics ", b"GET /metrics?")):
            return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        self._node_metrics.refresh()
        body = generate_latest(self._node_metrics.metrics.registry)
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {CONTENT_TYPE_LATEST}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        return head.encode() + body
