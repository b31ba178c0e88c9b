"""What simulated clients do: publish, look up and fetch, pin, lease, evict, read slowly, and now and then die."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from kvstore.client import Hit, KvClient, Sections
from kvstore.client.assemble import BlockReader
from kvstore.errors import ConcertinaError, CorruptBlockError, TransportError
from kvstore.metadata.base import NODE_TTL_S
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from .cluster import CLIENT, Cluster
from .content import BLOCKS, ENCODINGS, LAYERS, Prompt, prompts
from .loop import on_host
from .transport import SimTransport

#: A lookup names no node whose last beat is older than this: what expires, the reader's period, and two round trips at their deadline.
NOTICE_S = NODE_TTL_S + CLIENT.refresh_s + 2 * CLIENT.redis_timeout_s


class Worker:
    """One client and its habits. `host` and `client` are those of its latest start."""

    def __init__(self, cluster: Cluster, place: str) -> None:
        self.cluster = cluster
        self.place = place
        self.rng = cluster.rng
        self.history = cluster.history
        self.host = ""
        self.client: KvClient | None = None
        self._old_hits: list[tuple[Prompt, list[Hit]]] = []
        self._actions = {
            self.publish: 8, self.read: 8, self.read_foreign: 1, self.read_old: 1, self.read_slowly: 3,
            self.pin: 2, self.unpin: 1, self.lease: 2, self.evict: 0.5, self.clear: 0.1, self.die: 0.2,
        }  # fmt: skip

    async def work(self, until: float) -> None:
        """Act until the time `until`, then go quiet; the client stays."""
        await self.start()
        while self.cluster.loop.time() < until:
            await asyncio.sleep(self.rng.expovariate(1 / self.cluster.knobs.think_s))
            (action,) = self.rng.choices(list(self._actions), list(self._actions.values()))
            try:
                await on_host(self.cluster.loop, self.host, action())
            except asyncio.CancelledError:
                if self.host not in self.cluster.network.dead:
                    raise
                self.history.note("client dies", self.host)
                await self.start()

    async def start(self) -> None:
        self.host, self.client = await self.cluster.start_client(self.place)

    def _prompt(self) -> Prompt:
        return self.rng.choice(prompts())

    async def publish(self) -> None:
        prompt, encoding = self._prompt(), self.rng.randrange(len(ENCODINGS))
        blocks = prompt.encodings[encoding][: self.rng.randint(1, BLOCKS)]
        if self.rng.random() < 0.2:
            blocks = [block.truncate(1) for block in blocks]
        for block in blocks:
            self.history.wrote(block)
        self.history.note("publish", self.client.publish(blocks, input_tokens=4 * len(blocks)))

    async def read(self) -> None:
        prompt = self._prompt()
        hits = await self._look_up(prompt)
        bound, deadline_s = self.rng.choice((0.0, 0.0, 0.15, 0.3)), self.rng.choice((0.02, 0.3, 2.0))
        if hits and self.rng.random() < 0.2:
            self._old_hits.append((prompt, hits))
        await self._fetch(prompt, hits, prompt.namespace, bound, deadline_s)

    async def read_foreign(self) -> None:
        """Ask for another tenant's blocks."""
        prompt = self._prompt()
        other = next(p.namespace for p in prompts() if p.namespace != prompt.namespace)
        if await self._fetch(prompt, await self._look_up(prompt), other, 0.0, 0.5):
            self.history.violation("a block of another namespace was served")

    async def read_old(self) -> None:
        """Fetch by what was looked up long ago."""
        if self._old_hits:
            prompt, hits = self._old_hits.pop(0)
            await self._fetch(prompt, hits, prompt.namespace, 0.0, 0.5)

    async def _look_up(self, prompt: Prompt, deadline_s: float | None = None) -> list[Hit]:
        began, deadline_s = self.cluster.loop.time(), deadline_s or self.rng.choice((0.05, 0.25))
        hits = await self.client.lookup(prompt.keys, deadline_s=deadline_s)
        self.history.ended("lookup", began, deadline_s)
        for hit in hits:
            died = self.cluster.died.get(hit.node.incarnation)
            heard = self.cluster.backend.beats.get(hit.node.incarnation, 0.0)
            if died is not None and self.cluster.loop.time() > max(died, heard) + NOTICE_S:
                self.history.violation(f"a lookup named {hit.node.id}, which has been dead for {self.cluster.loop.time() - died:.2f} s")
        return hits

    async def _fetch(self, prompt: Prompt, hits: list[Hit], namespace: bytes, bound: float, deadline_s: float) -> int:
        began, told = self.cluster.loop.time(), []
        corrupt = self.client.metrics.corrupt_blocks.labels("fetch")._value
        before = corrupt.get()
        sections = Sections(self.rng.randint(1, BLOCKS)) if self.rng.random() < 0.4 else None
        fetched = await self.client.fetch(
            hits, namespace=namespace, max_distortion=bound, deadline_s=deadline_s, on_block=lambda at, block: told.append(block),
            sections=sections,
        )  # fmt: skip
        if corrupt.get() > before and namespace == prompt.namespace and not self.history.flips:
            self.history.violation("a block looked corrupt, though no bit was changed")
        self.history.ended("fetch", began, deadline_s)
        self.history.served(prompt.keys, namespace, bound, fetched.blocks)
        if told[: len(fetched.blocks)] != fetched.blocks or (len(told) > len(fetched.blocks) and not self._said_lost(sections)):
            self.history.violation("the blocks that were delivered one by one are not those returned")
        return len(fetched.blocks)

    @staticmethod
    def _said_lost(sections: Sections | None) -> bool:
        """Whether who waits for the upper layers of blocks that were given is told that they do not come."""
        try:
            if sections is not None:
                sections.wait(LAYERS)
            return False
        except TransportError:
            return True

    async def read_slowly(self) -> None:
        """Read a stream with long pauses while its pages are wanted by others."""
        prompt, nodes = self._prompt(), self.client.nodes()
        if not nodes:
            return
        node, blocks = self.rng.choice(nodes), []
        request = pb.GetRequest(keys=prompt.keys, pack=self.rng.random() < 0.5)
        try:
            async with aclosing(SimTransport(self.cluster.wire, self.host).get(node.address, request, 6.0)) as messages:
                reader = BlockReader(messages, 1 << 20)
                for number in range(BLOCKS):
                    await asyncio.sleep(self.rng.choice((0.0, 0.05, 0.3)))
                    block = await reader.read(number, lambda header: True)
                    if block is None:
                        break
                    blocks.append(block)
        except ConcertinaError as error:
            self.history.note("slow read ends", type(error).__name__)
            if isinstance(error, CorruptBlockError) and not self.history.flips:
                self.history.violation("a block looked corrupt, though no bit was changed")
        for block in blocks:
            self.history.served([block.header.key], prompt.namespace, 0.0, [block])

    async def pin(self) -> None:
        await self._administer("pin", self._some_keys(), self.rng.randint(1, 4))

    async def unpin(self) -> None:
        await self._administer("unpin", self._some_keys())

    async def evict(self) -> None:
        await self._administer("evict", self._some_keys())

    async def clear(self) -> None:
        await self._administer("clear", self.rng.choice((None, self._prompt().namespace)))

    async def lease(self) -> None:
        """Lease blocks; often without releasing them."""
        if nodes := self.client.nodes():
            node, transport = self.rng.choice(nodes), SimTransport(self.cluster.wire, self.host)
            request = pb.LookupRequest(keys=self._some_keys(), lease_ms=self.rng.choice((100, 1500)))
            try:
                answer = await transport.call(node.address, "Lookup", request, 1.0)
                if self.rng.random() < 0.5:
                    await transport.call(node.address, "Release", pb.ReleaseRequest(lease_id=answer.lease_id), 1.0)
            except ConcertinaError as error:
                self.history.note("lease fails", type(error).__name__)

    async def die(self) -> None:
        """The process ends, in the middle of whatever its queue is doing; another one takes its place."""
        self.cluster.network.dead.add(self.host)
        self.cluster.loop.kill(self.host)
        await asyncio.sleep(0)

    async def read_all(self, prompt: Prompt) -> tuple[int, int]:
        """With nothing wrong any more, read a whole prompt: how many blocks the index named, and how many came."""
        hits = await self._look_up(prompt, 2.0)
        return len(hits), await self._fetch(prompt, hits, prompt.namespace, 0.0, 2.0)

    def _some_keys(self) -> list[bytes]:
        return self.rng.sample(self._prompt().keys, self.rng.randint(1, 3))

    async def _administer(self, what: str, *args: object) -> None:
        began = self.cluster.loop.time()
        try:
            await getattr(self.client.admin, what)(*args)
        except ConcertinaError as error:
            self.history.note(f"{what} fails", type(error).__name__)
        self.history.ended(what, began, CLIENT.rpc_timeout_s)
