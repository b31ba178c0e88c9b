"""Delivered bandwidth: raw bytes of K and V that the model gets a second, fetched from a node and decoded.

The blocks are the cache of a real prompt, and go where the node's arena is: into the host's memory, or a GPU's. Decoding begins with the
first blocks that have come, while others are on their way. Beside it, in turns: the decoder alone on blocks that are here already, and a
plain TCP copy of the raw bytes.
"""

from __future__ import annotations

import asyncio
import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from kvstore.client import ClientConfig, Hit, KvClient
from kvstore.codecs import Codec, EncodedBlock, create
from kvstore.errors import TransportError
from kvstore.identity import NO_PARENT, block_keys
from services.engine.reader import DECODE_BLOCKS

from ..base import Result, log, relative_speed, take_turns
from .base import NAMESPACE, Values
from .party import servers
from .plain_tcp import PlainTcp

BLOCK_TOKENS = 64
#: Ways beside gRPC that the client may take, by the name in results.
PATHS = {"grpc": "", "tcp": "tcp", "same_host": "local"}
CODECS: dict[str, dict[str, Any]] = {"raw": {}, "int8": {}, "transform": {"ratio": 16.0}}
_DEADLINE_S = 60.0


def measure(result: Result, redis_url: str, model_name: str | None, profile_file: str | None) -> None:
    """Add the samples and rows of every codec and path to `result`."""
    from services.evaluate.model import CachedModel
    from services.model.resolve import resolve_model
    from services.profiles.obtain import find

    from ..codecs import blocks_of, prompt_of

    folder = resolve_model(model_name)
    model = CachedModel.load(folder, torch.bfloat16)
    ids = prompt_of(model, result.configuration["delivered_tokens"])
    profile = find(folder, profile_file)
    _, (keys, values) = model.run(ids, logits=False)
    device = result.configuration["device"]
    batch = [blocks_of(x, BLOCK_TOKENS).to(device) for x in (keys, values)]
    tokens = torch.tensor(ids).view(-1, BLOCK_TOKENS)
    raw_bytes = model.layout.raw_bytes(len(ids))
    for name, options in CODECS.items():
        if name == "transform" and profile is None:
            log("no profile of this model: transform is left out; concertina calibrate makes one")
            continue
        log(f"delivery of {len(tokens)} blocks of {name}")
        codec = create(name, model.layout, profile, **options)
        there = {"redis": redis_url, "device": device}
        with servers(there, arena_bytes=2 * raw_bytes + (64 << 20), copy_bytes=raw_bytes) as where:
            _case(result, codec, batch, tokens, raw_bytes, there | where)


def _case(result: Result, codec: Codec, batch: list[torch.Tensor], tokens: torch.Tensor, raw_bytes: int, where: dict[str, Any]) -> None:
    starts = list(range(0, tokens.numel(), BLOCK_TOKENS))
    chain = block_keys(NAMESPACE, tokens.flatten(), BLOCK_TOKENS)
    parents = [NO_PARENT, *chain]
    blocks = [
        block.with_identity(key, NAMESPACE, parent)
        for block, key, parent in zip(codec.encode(*batch, start=starts, tokens=tokens), chain, parents, strict=False)
    ]
    out = [torch.empty_like(x) for x in batch]
    plain = PlainTcp(Values(1, raw_bytes), where)
    deliveries = {name: Delivery(codec, tokens, out, where["redis"], paths) for name, paths in PATHS.items()}
    try:
        for delivery in deliveries.values():
            delivery.start(blocks)
        contestants = {"plain_tcp": plain.get, "decoder": lambda: decode_all(codec, blocks, tokens, out)}
        contestants |= {name: delivery.run for name, delivery in deliveries.items()}
        samples = take_turns(contestants, result.configuration["rounds"], warm_up=2)
    finally:
        plain.close()
        for delivery in deliveries.values():
            delivery.close()
    name, stored = codec.name, sum(block.header.total_bytes for block in blocks)
    result.samples |= {f"delivered.{name}.{contestant}_s": seconds for contestant, seconds in samples.items()}
    for path in PATHS:
        against = {f"raw_to_{yard}": relative_speed(samples, path, yard) for yard in ("plain_tcp", "decoder")}
        rate = raw_bytes / statistics.median(samples[path]) / 1e9
        result.rows.append({"delivered": name, "path": path, "ratio": raw_bytes / stored, "raw_gb_per_s": rate, **against})
        result.ratios |= {f"delivered.{name}.{path}_{yard}": value for yard, value in against.items()}


def decode_all(codec: Codec, blocks: list[EncodedBlock], tokens: torch.Tensor, out: list[torch.Tensor]) -> None:
    """The decoder alone, in the same pieces."""
    most = DECODE_BLOCKS[out[0].device.type]
    for at in range(0, len(blocks), most):
        part = slice(at, at + most)
        codec.decode(blocks[part], tokens=tokens[part], out=tuple(x[part] for x in out))
    settle(out[0].device)


def settle(device: torch.device) -> None:
    """Until a GPU has done what it was told."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)


class Delivery:
    """Fetches a prompt's blocks and decodes them into place as they come."""

    def __init__(self, codec: Codec, tokens: torch.Tensor, out: list[torch.Tensor], redis_url: str, paths: str) -> None:
        self._codec, self._tokens, self._out = codec, tokens, out
        self._loop = asyncio.new_event_loop()
        self._client = KvClient(ClientConfig(redis_url=redis_url, paths=paths))
        self._decoder = ThreadPoolExecutor(1)
        self._hits: list[Hit] = []

    def start(self, blocks: list[EncodedBlock]) -> None:
        """Have the blocks stored, and find them."""
        self._loop.run_until_complete(self._start(blocks))

    def run(self) -> None:
        """Deliver all blocks once."""
        self._loop.run_until_complete(self._run())

    def close(self) -> None:
        self._decoder.shutdown()
        self._loop.run_until_complete(self._client.close())
        self._loop.close()

    async def _start(self, blocks: list[EncodedBlock]) -> None:
        await self._client.start()
        self._client.publish(blocks)
        await self._client.flush(_DEADLINE_S)
        async with asyncio.timeout(_DEADLINE_S):
            while len(self._hits) < len(blocks):
                await asyncio.sleep(0.02)
                self._hits = await self._client.lookup([block.header.key for block in blocks])

    async def _run(self) -> None:
        arrived: asyncio.Queue[EncodedBlock] = asyncio.Queue()
        fetch = self._client.fetch(
            self._hits, namespace=NAMESPACE, deadline_s=_DEADLINE_S, on_block=lambda _, block: arrived.put_nowait(block)
        )
        fetching = asyncio.create_task(fetch)
        done = 0
        while done < len(self._hits):
            part = [await asyncio.wait_for(arrived.get(), _DEADLINE_S)]
            while len(part) < DECODE_BLOCKS[self._out[0].device.type] and not arrived.empty():
                part.append(arrived.get_nowait())
            span = slice(done, done + len(part))
            await self._loop.run_in_executor(self._decoder, self._decode, part, span)
            done += len(part)
        settle(self._out[0].device)
        if len((await fetching).blocks) != len(self._hits):
            raise TransportError("the fetch ended early")

    def _decode(self, part: list[EncodedBlock], span: slice) -> None:
        self._codec.decode(part, tokens=self._tokens[span], out=tuple(x[span] for x in self._out))
