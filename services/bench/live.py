"""A store for benchmarks: a Valkey and real node processes of small arenas, fed with blocks of made-up payload."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvstore.block import BlockHeader, Distortion, EncodedBlock, LayerInfo
from kvstore.client import ClientConfig, KvClient
from kvstore.codecs import CODECS
from kvstore.errors import ConfigError
from kvstore.identity import NO_PARENT, digest
from kvstore.metadata.embedded import EmbeddedValkey, start_valkey

#: Tokens of a block of a trace.
TOKENS = 512
_READY_S, _STOP_S = 60.0, 10.0


@dataclass(frozen=True, slots=True)
class Shape:
    """What the payload of every block looks like.

    Parameters
    ----------
    layers : tuple of int
        Bytes of each layer of fidelity, base first; page-sized, so that a block takes just these bytes of an arena.
    divergences : tuple of float
        Expected divergence in nats a token with so many layers, which is what a policy weighs a layer by.
    """

    layers: tuple[int, ...]
    divergences: tuple[float, ...]

    @property
    def size_bytes(self) -> int:
        return sum(self.layers)


class Maker:
    """Makes the blocks of one namespace, by number; payloads are the same bytes again and again, headers are not."""

    def __init__(self, name: str, shape: Shape) -> None:
        self.namespace = digest(b"benchmark", name.encode())
        self._payload = tuple(bytes(size) for size in shape.layers)
        rows = tuple(LayerInfo(0, 0, Distortion(d, d), d) for d in shape.divergences)
        self._header = BlockHeader(CODECS["raw"][0], 2, 1, 1, 64, 0, TOKENS, rows, len(rows))
        self._template = EncodedBlock.build(self._header, self._payload)

    def key(self, number: int) -> bytes:
        return NO_PARENT if number < 0 else digest(self.namespace, number.to_bytes(8, "little"))

    def block(self, number: int, parent: int = -1, depth: int = 0) -> EncodedBlock:
        """Block `number`, whose parent is block `parent` (-1 for none)."""
        header = replace(self._template.header, start=depth * TOKENS)
        return EncodedBlock(header, self._payload).with_identity(self.key(number), self.namespace, self.key(parent))


class LiveStore:
    """Nodes of one policy and a client of theirs. An asynchronous context: everything that was started ends with it.

    Parameters
    ----------
    redis : EmbeddedValkey
    name : str
        Prefix of its names in Redis.
    nodes : int
    arena_bytes, page_bytes : int
        Of each node.
    policy : str
    """

    def __init__(self, redis: EmbeddedValkey, name: str, *, nodes: int, arena_bytes: int, page_bytes: int, policy: str) -> None:
        self._config = ClientConfig(redis_url=redis.url, prefix=name, put_timeout_s=30.0)
        self._arguments = ["--redis", redis.url, "--prefix", name, "--policy", policy]
        self._arguments += ["--arena", str(arena_bytes), "--page-bytes", str(page_bytes)]
        self._count = nodes
        self._parts = AsyncExitStack()
        self.client: KvClient

    async def __aenter__(self) -> LiveStore:
        async with AsyncExitStack() as stack:
            nodes = [stack.enter_context(_Node(self._arguments)) for _ in range(self._count)]
            await asyncio.gather(*(asyncio.to_thread(node.wait) for node in nodes))
            self.client = KvClient(self._config)
            await self.client.start()
            stack.push_async_callback(self.client.close)
            self._parts = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._parts.aclose()

    async def totals(self) -> dict[str, int]:
        """Evictions and demotions of all nodes so far."""
        stats = [await self.client.admin.stats(node) for node in self.client.nodes()]
        return {name: sum(getattr(s, name) for s in stats) for name in ("evictions", "demotions")}


class _Node:
    """One ``concertina node`` process."""

    def __init__(self, arguments: list[str]) -> None:
        self._command = [sys.executable, "-m", "services.cli", "node", *arguments]

    def __enter__(self) -> _Node:
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=self._log)
        return self

    def wait(self) -> dict[str, Any]:
        """What the node says when it is ready. Raises ConfigError with the end of its log if it does not get there."""
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise ConfigError(f"a store node did not start: {self._log.read()[-1500:].decode(errors='replace')}")
        return json.loads(line)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()


def valkey(directory: str | Path) -> EmbeddedValkey:
    """A Valkey of its own for a benchmark; `stop` it."""
    return start_valkey(Path(directory) / "valkey")
