"""A client over a transport in memory that can be told to misbehave."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import numpy as np

from kvstore.block import BlockHeader, Distortion, EncodedBlock, LayerInfo, Provenance
from kvstore.client import ClientConfig, KvClient
from kvstore.errors import TransportError
from kvstore.identity import NO_PARENT, block_keys, digest
from kvstore.metadata import IndexEntry, InprocMetadata, NodeRecord
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

NAMESPACE = digest(b"tenant a")
NODES = [NodeRecord(f"n{i}", f"{i:016x}", f"node{i}:1", arena_bytes=1 << 30) for i in range(2)]


def chain(
    count: int, size: int = 1000, distortion: float = 0.0, provenance: Provenance | None = None, number: int = 0
) -> list[EncodedBlock]:
    """A chain of named blocks with random payloads of two layers. Chains of other numbers share no block."""
    rng = np.random.default_rng([7, number])
    keys = block_keys(NAMESPACE, number + np.arange(count * 4), 4)
    rows = (LayerInfo(0, 0, Distortion(2 * distortion, 0.0)), LayerInfo(0, 0, Distortion(0.0, distortion)))
    blocks = []
    for i, key in enumerate(keys):
        header = BlockHeader(1, 0, 1, 1, 1, 4 * i, 4, rows, 2)
        block = EncodedBlock.build(header, (rng.bytes(size), rng.bytes(size // 2)))
        blocks.append(block.with_identity(key, NAMESPACE, keys[i - 1] if i else NO_PARENT, provenance))
    return blocks


class LoopbackTransport:
    """Serves serialized blocks by address from memory. `spoil` rewrites what a key is answered with."""

    def __init__(self, frame_bytes: int = 1 << 20) -> None:
        self.stored: dict[str, dict[bytes, bytes]] = defaultdict(dict)
        self.spoil: dict[bytes, list[pb.GetResponse]] = {}
        self.fail: dict[str, Exception] = {}
        self.stuck_at: set[bytes] = set()
        self.sent: list[bytes] = []
        self.put_delay_s = 0.0
        self.status: dict[bytes, int] = {}
        self.told: dict[str, list[bytes]] = defaultdict(list)  # keys that came without a payload
        self._frame_bytes = frame_bytes

    async def get(self, address, request, timeout_s):
        if address in self.fail:
            raise self.fail[address]
        for index, key in enumerate(request.keys):
            if key in self.stuck_at:
                await asyncio.sleep(60)
            for message in self.spoil.get(key) or self._messages(self.stored[address].get(key), request.section):
                await asyncio.sleep(0)
                if key not in self.spoil:
                    message.index = index
                self.sent.append(key)
                yield message.SerializeToString()

    def _messages(self, blob, section):
        if blob is None:
            return [pb.GetResponse(status=pb.BLOCK_STATUS_NOT_FOUND)]
        header = BlockHeader.from_bytes(blob)
        payload = blob[header.header_bytes :]
        payload = payload[slice(*header.section(section - 1))] if section else payload
        cuts = range(0, max(len(payload), 1), self._frame_bytes)
        messages = [pb.GetResponse(status=pb.BLOCK_STATUS_OK, payload=payload[at : at + self._frame_bytes]) for at in cuts]
        messages[0].header = blob[: header.header_bytes]
        return messages

    async def put(self, address, messages, timeout_s):
        await asyncio.sleep(self.put_delay_s)
        if address in self.fail:
            raise self.fail[address]
        blobs: dict[int, bytes] = defaultdict(bytes)
        for message in map(pb.PutRequest.FromString, messages):
            for frame in (message, *message.more):
                blobs[frame.index] += frame.header + frame.payload
        statuses = []
        for blob in blobs.values():
            header = EncodedBlock.from_bytes(blob).header
            key = header.key
            if not header.payload_bytes:
                self.told[address].append(key)
                statuses.append(pb.BLOCK_STATUS_DATA_LOSS)
                continue
            statuses.append(self.status.get(key, pb.BLOCK_STATUS_OK))
            if statuses[-1] == pb.BLOCK_STATUS_OK:
                self.stored[address][key] = blob
        return pb.PutResponse(statuses=statuses)

    async def call(self, address, rpc, request, timeout_s):
        raise TransportError("not served")

    async def keep(self, addresses):
        pass

    async def close(self):
        pass


class Bench:
    """A client, its transport and metadata, and a chain that is stored on both nodes in turn."""

    def __init__(self, **config) -> None:
        clock = config.pop("clock", None)
        self.metadata = InprocMetadata(clock)
        self.transport = LoopbackTransport(config.pop("frame_bytes", 1 << 20))
        self.client = KvClient(ClientConfig(**config), clock=clock, metadata=self.metadata, transport=self.transport)

    async def __aenter__(self):
        for node in NODES:
            await self.metadata.heartbeat(node, 60)
        await self.client.start()
        return self

    async def __aexit__(self, *_):
        await self.client.close()

    async def store(self, blocks):
        for i, block in enumerate(blocks):
            node = NODES[i % 2]
            self.transport.stored[node.address][block.header.key] = block.to_bytes()
            await self.metadata.announce(node.incarnation, [IndexEntry(block.header.key, block.header.total_bytes, block.header.present)])
        return [block.header.key for block in blocks]

    async def fetch(self, keys, **options):
        hits = await self.client.lookup(keys)
        return await self.client.fetch(hits, **{"namespace": NAMESPACE, "deadline_s": 5, **options})

    def count(self, name, *labels):
        metric = getattr(self.client.metrics, name)
        return (metric.labels(*labels) if labels else metric)._value.get()
