"""The store as a worker, a connector or a command sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvstore.block import EncodedBlock
from kvstore.clock import Clock, SystemClock
from kvstore.identity import NO_PARENT
from kvstore.metadata import Metadata, NodeRecord, WorkerRecord, connect
from kvstore.metrics import Metrics

from .admin import Admin
from .claims import Claims
from .config import ClientConfig
from .copies import HotCopies
from .doors import Doors
from .fetch import Fetcher
from .lookup import Hit, Lookup
from .membership import Membership
from .prefix import Demand, Fetched, OnBlock
from .publish import Publisher
from .sections import Sections
from .security import Security
from .transport import GrpcTransport, Transport


class KvClient:
    """Lookup, fetch and publish. The store is an accelerator: these three never raise because it is slow or gone, they miss.

    Parameters
    ----------
    config : ClientConfig
    metrics : Metrics, optional
        Counters of the process; a registry of its own by default.
    clock : Clock, optional
    metadata, transport : optional
        Take the place of Redis and gRPC, for simulation.

    Use it from one event loop, between `start` and `close`.
    """

    def __init__(
        self,
        config: ClientConfig,
        metrics: Metrics | None = None,
        clock: Clock | None = None,
        metadata: Metadata | None = None,
        transport: Transport | None = None,
    ) -> None:
        self.config = config
        self.metrics = metrics or Metrics()
        clock = clock or SystemClock()
        self.metadata = metadata or connect(config.redis_url, config.prefix, config.redis_timeout_s)
        security = Security.of(config)
        # A token must not leave the host in plain text where the operator asked for TLS.
        paths = tuple(way for way in config.paths.split(",") if way and (way == "local" or security.tls is None))
        self._doors = Doors(paths, security.token, clock) if transport is None and paths else None
        self._transport = transport or GrpcTransport(security)
        self._membership = Membership(
            self.metadata, clock, self.metrics, config.refresh_s, config.suspect_s, changed=self._changed
        )
        self._lookup = Lookup(self._membership, config.tidy_after_s)
        self._fetcher = Fetcher(self._transport, self._membership, config, self.metrics, clock, self._doors)
        self._claims = Claims(self._membership)
        self._publisher = Publisher(
            self._transport, self._membership, self._lookup, self._claims, config, self.metrics, self._doors
        )
        self._copies = HotCopies(clock, config.copy_bytes_per_s)
        self.admin = Admin(self._transport, self._membership, config.rpc_timeout_s)

    async def start(self) -> None:
        """Read the membership once and begin. Succeeds without a store, too: all is a miss until there is one."""
        await self._membership.start()
        self._publisher.start()

    async def close(self, flush_s: float = 0.0) -> None:
        """Publish for at most `flush_s` more seconds, then give everything back. Safe to call twice."""
        await self._publisher.stop(flush_s)
        await self._lookup.stop()
        await self._membership.stop()
        self._fetcher.stop()
        if self._doors is not None:
            await asyncio.to_thread(self._doors.close)
        await self._transport.close()
        await self.metadata.close()

    async def _changed(self, addresses: set[str]) -> None:
        """Keep open what leads to these addresses, and to the living nodes."""
        await self._transport.keep(addresses)
        if self._doors is not None:
            self._doors.keep(set(self._membership.everyone()))

    @property
    def available(self) -> bool:
        """Whether the metadata answered when it was last asked."""
        return self._membership.available

    async def lookup(self, keys: Sequence[bytes], *, deadline_s: float = 0.25) -> list[Hit]:
        """The longest prefix of `keys` that is whole in the store: the leading run that living nodes have announced.

        One round trip for thousands of keys. Empty when the metadata is away or late.

        Raises
        ------
        InvalidInputError
            For a key that is not 32 bytes.
        """
        return await self._lookup.prefix(keys, deadline_s)

    async def fetch(
        self,
        hits: Sequence[Hit],
        *,
        namespace: bytes,
        parent_of_first: bytes = NO_PARENT,
        max_distortion: float = 0.0,
        deadline_s: float = 2.0,
        on_block: OnBlock | None = None,
        input_tokens: int = 0,
        sections: Sections | None = None,
    ) -> Fetched:
        """Get the blocks of `hits`: verified, in order, cut at the first that is missing, damaged, foreign, or not exact enough.

        Parameters
        ----------
        namespace : bytes
            Every block must be of it.
        parent_of_first : bytes
            Key before the first hit; each further block must name the one before it as its parent.
        max_distortion : float
            Above 0: neither K nor V of a block, nor of the prefix that it was computed on, may be worse.
        deadline_s : float
            Then the whole prefix that has arrived is returned.
        on_block : callable, optional
            Called with position and block, in order, as the prefix grows.
        input_tokens : int
            Length of the prompt, for the nodes' eviction policy.
        sections : Sections, optional
            The last blocks are given when the model's lowest layers are there; `sections.wait` says when others are.

        Returns
        -------
        Fetched
            The blocks refer to the buffers that they arrived in.
        """
        demand = Demand(namespace, parent_of_first, max_distortion, input_tokens)
        fetched = await self._fetcher.fetch(hits, demand, deadline_s, on_block, sections)
        if (copies := self._copies.choose(hits, fetched.blocks, self._membership.living())) is not None:
            self._publisher.offer(copies[1], input_tokens, copy_to=copies[0])
        return fetched

    def publish(self, blocks: Sequence[EncodedBlock], *, input_tokens: int = 0) -> int:
        """Queue blocks for writing and return at once. The leading ones that fit are taken; the number is returned.

        The blocks' buffers must not change until they have been written.

        Raises
        ------
        InvalidInputError
            For a block without key and namespace.
        """
        return self._publisher.offer(blocks, input_tokens)

    async def claim(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of these blocks are this client's to encode and publish: those that no other has claimed a moment ago.

        Claims end when `publish` has dealt with the block, or by themselves. Never raises for a store that is away: all are ours then.
        """
        return await self._claims.take(keys)

    async def flush(self, timeout_s: float = 5.0) -> bool:
        """Wait until everything queued has been written or given up. Returns False when `timeout_s` passed first."""
        return await self._publisher.flush(timeout_s)

    def nodes(self) -> list[NodeRecord]:
        """The living nodes as last heard, by id."""
        return self.admin.nodes()

    async def workers(self) -> list[WorkerRecord]:
        """The living workers, by id. Raises TransportError or DeadlineError when the metadata is away."""
        return await self.metadata.workers()
