"""The hosts of a simulation: store nodes and clients that start, crash and come back, and what is known of them from outside."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field, replace

from kvstore.arena import AccountingError
from kvstore.client import ClientConfig, KvClient
from kvstore.metadata import NodeRecord
from kvstore.metrics import Metrics
from kvstore.node import NodeConfig
from kvstore.node.node import StoreNode
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from .backend import REDIS, Backend, metadata
from .history import History
from .knobs import Knobs
from .loop import VirtualLoop, on_host
from .network import HostClock, Network
from .transport import SimServer, SimTransport, Wire

PAGE_BYTES = 512
CLIENT = ClientConfig(queue_blocks=64, batch_blocks=8, put_timeout_s=1.5, rpc_timeout_s=1.0, tidy_after_s=4.0)


class SimNode(StoreNode):
    """A store node that says it is on a machine of its own, so that no reader looks for its memory."""

    host = ""

    def _identity(self) -> NodeRecord:
        return replace(super()._identity(), host=self.host)


@dataclass(slots=True, eq=False)
class Member:
    """One start of a node: its host, the node, the promises that outsiders saw it make, and whether its memory was tampered with."""

    host: str
    node: SimNode
    server: SimServer
    pins: dict[bytes, tuple[float, int]] = field(default_factory=dict)
    damaged: bool = False

    @property
    def incarnation(self) -> str:
        return self.node.service.record.incarnation


class Cluster:
    """All hosts of one run: `members` are the living nodes by their place, `died` the time of death of each incarnation."""

    def __init__(self, seed: int, knobs: Knobs, loop: VirtualLoop, history: History) -> None:
        self.seed = seed
        self.knobs = knobs
        self.loop = loop
        self.history = history
        self.rng = random.Random(f"cluster {seed}")
        self.network = Network(loop, knobs, random.Random(f"network {seed}"), history)
        self.backend = Backend(self.network, HostClock(loop, REDIS))
        self.wire = Wire(self.network)
        self.wire.observe = self._observe
        self.clocks: dict[str, HostClock] = {}
        self.members: dict[str, Member] = {}
        self.died: dict[str, float] = {}
        self.node_metrics = Metrics()
        self._by_server: dict[SimServer, Member] = {}
        self.starts = 0

    async def start_node(self, place: str, address: str = "") -> Member:
        """Start a node at `place`, by default under that place's own address, once nobody listens there."""
        address = address or f"{place}:7000"
        while address in self.wire.servers:
            await asyncio.sleep(0.1)
        host, clock = self._new_host(place)
        servers: list[SimServer] = []

        def serve(config, service, _) -> SimServer:
            servers.append(SimServer(self.wire, host, service))
            return servers[0]

        config = NodeConfig(
            listen=address, arena=self.knobs.pages * PAGE_BYTES, page_bytes=PAGE_BYTES, policy=self.knobs.policy,
            id=place, max_leases=8, get_hold_s=2.0, put_timeout_s=3.0, get_timeout_s=3.0, drain_s=0.5,
            spill_host_bytes=self.knobs.spill,
        )  # fmt: skip
        node = SimNode(config, metadata(self.backend, host, 0.8), clock, self.node_metrics, serve)
        node.host = host
        await on_host(self.loop, host, node.start())
        member = Member(host, node, servers[0])
        self._by_server[servers[0]] = self.members[place] = member
        self.history.note("node starts", host, member.incarnation)
        return member

    def crash(self, place: str) -> None:
        """The node's process ends at once."""
        member = self.members.pop(place)
        self._gone(member)
        member.server.close()
        self.network.dead.add(member.host)
        self.loop.kill(member.host)
        member.node.arena.close()
        self.history.note("node dies", member.host)

    async def drain(self, place: str) -> None:
        """The node is asked to end."""
        member = self.members.pop(place)
        self.history.note("node drains", member.host)
        await on_host(self.loop, member.host, member.node.stop())
        self._gone(member)

    async def start_client(self, place: str) -> tuple[str, KvClient]:
        """A client on a host of its own."""
        host, clock = self._new_host(place)
        client = KvClient(CLIENT, Metrics(), clock, metadata(self.backend, host), SimTransport(self.wire, host))
        await on_host(self.loop, host, client.start())
        return host, client

    def _new_host(self, place: str) -> tuple[str, HostClock]:
        self.starts += 1
        host = f"{place}.{self.starts}"
        clock = self.clocks[host] = HostClock(self.loop, f"{self.seed} {host}")
        return host, clock

    def _gone(self, member: Member) -> None:
        self.died[member.incarnation] = self.loop.time()

    # ---- what is checked from outside

    def _observe(self, server: SimServer, rpc: str, request: bytes, response: bytes) -> None:
        """Learn which pins a node has promised or ended."""
        if rpc not in ("Pin", "Unpin"):
            return
        member = self._by_server[server]
        engine = member.node.engine
        if rpc == "Unpin":
            for key in pb.UnpinRequest.FromString(request).keys:
                member.pins.pop(key, None)
            return
        asked = pb.PinRequest.FromString(request)
        for key, status in zip(asked.keys, pb.PinResponse.FromString(response).statuses, strict=True):
            if status == pb.BLOCK_STATUS_OK:
                now, generation = engine.clock.now(), engine.table.get(key).generation
                before = member.pins.get(key, (0.0, 0))
                if before[0] > now:  # the pin was there already
                    generation = before[1]
                member.pins[key] = (max(before[0], now + asked.ttl_seconds), generation)

    def inspect(self, member: Member) -> None:
        """Look into a living node: its account, its pins, and every byte that it holds."""
        node, history = member.node, self.history
        try:
            node.engine.check()
            node.spill.check()
        except AccountingError as error:
            history.violation(f"the account of {member.host} is wrong: {error}")
        now = node.engine.clock.now()
        member.pins = {key: pin for key, pin in member.pins.items() if pin[0] > now}
        for key, (_, generation) in member.pins.items():
            entry = node.engine.table.get(key)
            if entry is None or entry.generation != generation:
                history.violation(f"{member.host} lost a block that it had pinned")
        for entry in () if member.damaged else node.engine.table:
            header = entry.header
            layers = zip(header.rows, entry.layers, strict=False)
            payload = b"".join(part for row, layer in layers for part in node.arena.read(layer, 0, row.size_bytes))
            if not history.known(header.namespace, header.key, header.to_bytes() + payload):
                history.violation(f"{member.host} holds bytes that nobody wrote under their key")

    async def watch(self, pause_s: float = 0.5) -> None:
        """Inspect all living nodes again and again."""
        while True:
            await asyncio.sleep(pause_s)
            for member in list(self.members.values()):
                self.inspect(member)
