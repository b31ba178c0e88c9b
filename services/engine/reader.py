"""Get a prompt's cached prefix into a live cache, in bounded time; whatever goes wrong is a miss."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import torch

from kvstore.block import Distortion, EncodedBlock, Provenance
from kvstore.client import Hit, KvClient
from kvstore.clock import Clock
from kvstore.codecs import Codec, codec_for_wire_id, name_of_wire_id
from kvstore.errors import ConcertinaError, CorruptBlockError
from kvstore.identity import NO_PARENT
from kvstore.metrics import Metrics

from .base import GenerateSpec
from .coming import Coming
from .job import Prefix
from .live import Layers, LiveKV
from .rates import Rates

#: Blocks decoded in one call, by kind of device: large enough to keep the cores busy, or to share the launches and the wait of a call,
#: small enough to stop at a deadline.
DECODE_BLOCKS = {"cpu": 8, "cuda": 32}
#: Blocks of the last call, whose lower layers are computed with while the upper ones are decoded.
LAST_BLOCKS = 32
#: Codecs with a profile that are held at once; a profile takes some hundred MiB once it is in use.
MAX_PROFILES = 4
#: Of the time that is left after the lookup; the last blocks must still be decoded.
FETCH_SHARE = 0.9
log = logging.getLogger(__name__)


class StoreReader:
    """Looks up, fetches and decodes, from the event loop, before a request takes a batch slot.

    Parameters
    ----------
    client : KvClient
    codec : Codec
        The engine's own. Blocks of codecs that need no profile are read as well, and those of codecs that `learn` was given.
    block_tokens : int
    workers : Executor
        Where decoding runs.
    replays : bool
        Whether the model's steps are replayed whole, which takes less time than to launch one layer by layer beside decoding.
    on_unknown : callable
        Told the codec's number and the profile's digest of a block that cannot be read for want of its profile.
    """

    def __init__(
        self, client: KvClient, codec: Codec, block_tokens: int, workers: Executor, rates: Rates, metrics: Metrics,
        clock: Clock, replays: bool = False, on_unknown: Callable[[int, bytes], None] = lambda number, profile: None,
    ) -> None:  # fmt: skip
        self._client, self._layout, self._block_tokens = client, codec.layout, block_tokens
        self._workers, self._rates, self._metrics, self._clock = workers, rates, metrics, clock
        self._replays, self._on_unknown = replays, on_unknown
        #: By what a block's header names: the codec's number and the profile's digest. Without a profile: None if it cannot be had.
        self._codecs: dict[tuple[int, bytes], Codec | None] = {}
        self.learn(codec)

    def learn(self, codec: Codec) -> None:
        """Read blocks of this codec and profile from now on; forget the profile that was learnt first when there are too many."""
        self._codecs[codec.wire_id, codec.profile_digest] = codec
        with_profile = [name for name in self._codecs if name[1] != NO_PARENT]
        if len(with_profile) > MAX_PROFILES:
            del self._codecs[with_profile[0]]

    async def read(self, spec: GenerateSpec, prefix: Prefix, usable: int) -> None:
        """Continue `prefix`, whose pages are there, with the longest cached run of its first `usable` blocks."""
        known = prefix.tokens // self._block_tokens
        if usable > known:
            budget_s = spec.store_deadline_s if spec.store_deadline_s is not None else self._rates.store_budget_s(len(spec.tokens))
            await self._read_within(spec, prefix, prefix.keys[known:usable], budget_s)
        self._metrics.lookup_tokens.labels(result="hit").inc(prefix.tokens)
        self._metrics.lookup_tokens.labels(result="miss").inc(len(spec.tokens) - prefix.tokens)

    async def _read_within(self, spec: GenerateSpec, prefix: Prefix, keys: Sequence[bytes], budget_s: float) -> None:
        began = self._clock.now()
        looked, before = None, prefix.tokens
        hits: Sequence[Hit] = ()
        try:
            hits = await self._client.lookup(keys, deadline_s=budget_s)
            looked = self._clock.now()
            if hits and self._rates.worth_fetching(len(hits), self._block_tokens):
                await self._fill(spec, prefix, hits, began + budget_s)
        except CorruptBlockError as error:
            log.warning("request %s goes on with what came before a damaged block: %s", spec.request_id, error)
            self._metrics.corrupt_blocks.labels(where="decode").inc()
        except (ConcertinaError, TimeoutError, OSError) as error:
            log.info("request %s goes on without the store: %s", spec.request_id, error)
            self._metrics.store_unavailable.labels(part="engine").inc()
        now = self._clock.now()
        prefix.lookup_s = (looked if looked is not None else now) - began
        if prefix.report.bytes_fetched:
            prefix.fetch_s = now - began - prefix.lookup_s
            # What came of a fetch that was cut short stands for the whole of it.
            share = max(prefix.tokens - before, self._block_tokens) / (len(hits) * self._block_tokens)
            self._note(prefix.kv.coming, len(hits), began + prefix.lookup_s, share)

    def _note(self, coming: Coming | None, blocks: int, since: float, share: float) -> None:
        """Measure the fetch, up to the last layer."""
        if coming is None:
            self._rates.fetched(blocks, (self._clock.now() - since) / share)
        else:
            loop = asyncio.get_running_loop()
            coming.whole(lambda: loop.is_closed() or loop.call_soon_threadsafe(self._note, None, blocks, since, share))

    async def _fill(self, spec: GenerateSpec, prefix: Prefix, hits: Sequence[Hit], until: float) -> None:
        """Fetch, and decode into place what has arrived while the rest is on its way."""
        arrived = Arrived(len(hits))
        known = prefix.tokens // self._block_tokens
        parent = prefix.keys[known - 1] if known else NO_PARENT

        async def fetch() -> int:
            try:
                fetched = await self._client.fetch(
                    hits, namespace=prefix.namespace, parent_of_first=parent, max_distortion=spec.max_distortion,
                    input_tokens=len(spec.tokens), deadline_s=FETCH_SHARE * max(0.0, until - self._clock.now()),
                    on_block=lambda _, block: arrived.put(block),
                )  # fmt: skip
                return fetched.bytes_fetched
            finally:
                arrived.end()

        task = asyncio.create_task(fetch())
        try:
            await self._decode(spec, prefix, arrived, until)
            prefix.report.bytes_fetched = await task
        finally:
            task.cancel()

    async def _decode(self, spec: GenerateSpec, prefix: Prefix, arrived: Arrived, until: float) -> None:
        """Decode blocks as they come until one cannot be read or the time is over; what is in place counts.

        Of the last of them the lower layers are enough, where the codec is `layerwise` and the model `computes_beside` it, in steps that
        are not replayed.
        """
        size = self._block_tokens
        while self._clock.now() < until and (block := await arrived.next()):
            first = prefix.tokens // size
            codec = self._codec_for(block, first * size)
            if codec is None:
                return
            ends = codec.layerwise and arrived.ends_within(LAST_BLOCKS)
            batch = arrived.take_like(block, LAST_BLOCKS if ends else DECODE_BLOCKS[prefix.kv.device.type])
            ids = [spec.tokens[(first + i) * size : (first + i + 1) * size] for i in range(len(batch))]
            by_layers = ends and arrived.ends_within(0) and not self._replays and computes_beside(prefix.kv.device)
            await self._decode_batch(prefix.kv, first, batch, codec, ids, by_layers)
            self._account(prefix, batch)

    async def _decode_batch(
        self, kv: LiveKV, first: int, batch: list[EncodedBlock], codec: Codec, ids: list[Sequence[int]], by_layers: bool
    ) -> None:
        """Decode blocks of one codec into their pages; with `by_layers` until some layers are there, and `kv.coming` tells of the rest."""
        loop, coming = asyncio.get_running_loop(), Coming()
        lower = loop.create_future()

        def on_layers(layers: int) -> None:
            coming.there(layers)
            if by_layers and not lower.done():
                loop.call_soon_threadsafe(lambda: lower.done() or lower.set_result(None))

        decoding = loop.run_in_executor(self._workers, self._decode_into, kv, first, batch, codec, ids, coming, on_layers)
        try:
            await asyncio.wait([decoding, lower], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await asyncio.wait([decoding])  # until then its pages are written to, and must not be given back
            raise
        if decoding.done():
            decoding.result()
        else:
            kv.coming = coming
            decoding.add_done_callback(self._decoded)
        kv.length = (first + len(batch)) * self._block_tokens

    @torch.inference_mode()
    def _decode_into(
        self, kv: LiveKV, first: int, batch: list[EncodedBlock], codec: Codec, ids: list[Sequence[int]], coming: Coming, on_layers: Layers
    ) -> None:  # fmt: skip
        began, lost = self._clock.now(), True
        try:
            pages = kv.page_ids[first : first + len(batch)]
            kv.pool.fill(pages, lambda k, v, place: codec.decode(batch, tokens=ids, out=(k, v), on_layers=place), on_layers)
            lost = False
        finally:
            coming.end(lost)
        self._metrics.decode_seconds.labels(codec=codec.name).observe(self._clock.now() - began)

    def _decoded(self, decoding: asyncio.Future[None]) -> None:
        """What was begun to be computed with is there, or lost: then it is computed again (`Core`)."""
        if (error := decoding.exception()) is not None:
            log.warning("blocks could not be decoded to the end: %s", error)
            self._metrics.corrupt_blocks.labels(where="decode").inc()

    def _account(self, prefix: Prefix, batch: list[EncodedBlock]) -> None:
        """Count blocks that are in place, and what computing on top of them is worth."""
        report = prefix.report
        for block in batch:
            own, before = block.distortion[block.header.present], block.header.provenance
            worst = Distortion(
                max(own.keys, before.distortion.keys, prefix.provenance.distortion.keys),
                max(own.values, before.distortion.values, prefix.provenance.distortion.values),
            )
            levels = [f for f in (block.header.present, before.fidelity, prefix.provenance.fidelity) if f]
            prefix.provenance = Provenance(min(levels), worst) if worst.keys or worst.values else Provenance()
            report.fidelity = min(report.fidelity or block.header.present, block.header.present)
            report.distortion = max(worst.keys, worst.values)
        prefix.tokens += len(batch) * self._block_tokens
        report.cached_tokens, report.blocks_hit = prefix.tokens, prefix.tokens // self._block_tokens

    def _codec_for(self, block: EncodedBlock, start: int) -> Codec | None:
        """Who can read `block`, which should begin at `start`; None, counted, where nobody here can."""
        header = block.header
        if header.start != start or header.tokens != self._block_tokens:
            self._metrics.unreadable_blocks.labels(reason="shape").inc()
            return None
        name = header.codec, header.profile
        if header.profile == NO_PARENT and name not in self._codecs:
            self._codecs[name] = self._without_profile(header.codec)
        codec = self._codecs.get(name)
        if codec is None:
            known = header.profile != NO_PARENT and name_of_wire_id(header.codec) is not None
            self._metrics.unreadable_blocks.labels(reason="profile" if known else "codec").inc()
            if known:
                self._on_unknown(*name)
        return codec

    def _without_profile(self, number: int) -> Codec | None:
        try:
            return codec_for_wire_id(number)(self._layout)
        except (ConcertinaError, ImportError) as error:
            log.info("blocks of codec number %d cannot be read here: %s", number, error)
            return None


def computes_beside(device: torch.device) -> bool:
    """Whether a model on `device` gains by computing while blocks are decoded. On a CPU both need the same cores, and get in each other's
    way: 2,048 tokens in `transform` at 16x came 5.1 times sooner than computed, instead of 6.3 times.
    """
    return device.type != "cpu"


class Arrived:
    """Blocks that have come and wait to be decoded, in order; at most `expected`."""

    def __init__(self, expected: int) -> None:
        self._missing = expected
        self._blocks: deque[EncodedBlock] = deque()
        self._more = asyncio.Event()

    def ends_within(self, blocks: int) -> bool:
        """Whether no more will come, and at most so many wait."""
        return not self._missing and len(self._blocks) <= blocks

    def put(self, block: EncodedBlock) -> None:
        """One more."""
        self._blocks.append(block)
        self._missing -= 1
        self._more.set()

    def end(self) -> None:
        """No more will come."""
        self._missing = 0
        self._more.set()

    async def next(self) -> EncodedBlock | None:
        """The next one, which stays; None when there will be none."""
        while not self._blocks and self._missing:
            self._more.clear()
            await self._more.wait()
        return self._blocks[0] if self._blocks else None

    def take_like(self, like: EncodedBlock, limit: int) -> list[EncodedBlock]:
        """The next ones, as long as they go on from `like`, which is the first, with the same codec; at most `limit`."""
        taken: list[EncodedBlock] = []
        first = like.header
        while self._blocks and len(taken) < limit:
            header = self._blocks[0].header
            start = first.start + len(taken) * first.tokens
            if (header.codec, header.profile, header.tokens, header.start) != (first.codec, first.profile, first.tokens, start):
                break
            taken.append(self._blocks.popleft())
        return taken
