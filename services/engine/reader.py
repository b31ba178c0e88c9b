"""Get a prompt's cached prefix into a live cache, in bounded time; whatever goes wrong is a miss."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial

import torch

from kvstore.block import SECTIONS, Distortion, EncodedBlock, Provenance
from kvstore.client import Hit, KvClient, Sections
from kvstore.clock import Clock
from kvstore.codecs import Codec, codec_for_wire_id, name_of_wire_id
from kvstore.errors import ConcertinaError, CorruptBlockError, TransportError
from kvstore.identity import NO_PARENT
from kvstore.metrics import Metrics

from .arrived import Arrived
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
#: A step that waits for layers holds others' prompts up: it begins with the lower ones when the upper ones are expected within the first
#: time, and those that have not come within the second are computed.
HELD_S, MOST_HELD_S = 0.25, 1.0
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
        self._fetching: set[asyncio.Task[int]] = set()  # upper layers, for which nobody waits here
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
        """Fetch, and decode into place what has arrived while the rest is on its way.

        Where lower layers are enough to go on with, upper ones may come after this has returned, until `kv.coming` has ended.
        """
        beside = computes_beside(prefix.kv.device) and not self._replays
        arrived = Arrived(len(hits), Sections(LAST_BLOCKS) if beside else None)
        known = prefix.tokens // self._block_tokens
        parent = prefix.keys[known - 1] if known else NO_PARENT

        async def fetch() -> int:
            try:
                fetched = await self._client.fetch(
                    hits, namespace=prefix.namespace, parent_of_first=parent, max_distortion=spec.max_distortion,
                    input_tokens=len(spec.tokens), deadline_s=FETCH_SHARE * max(0.0, until - self._clock.now()),
                    on_block=lambda _, block: arrived.put(block), sections=arrived.sections,
                )  # fmt: skip
                return fetched.bytes_fetched
            finally:
                arrived.end()

        task = asyncio.create_task(fetch())
        try:
            await self._decode(spec, prefix, arrived, until, partial(_cancel, asyncio.get_running_loop(), task))
            if prefix.kv.coming is not None and not task.done():
                self._fetching.add(task)  # until its deadline
                task.add_done_callback(self._fetched)
                prefix.report.bytes_fetched = arrived.bytes_taken
            else:
                prefix.report.bytes_fetched = await task
        finally:
            if task not in self._fetching:
                task.cancel()

    async def _decode(self, spec: GenerateSpec, prefix: Prefix, arrived: Arrived, until: float, stop: Callable[[], None]) -> None:
        """Decode blocks as they come until one cannot be read or the time is over; what is in place counts.

        Of the last of them the lower layers are enough, where the model `computes_beside` it, in steps that are not replayed: those of
        codecs that are `layerwise` are decoded so, and of blocks with sections the payload comes so.
        """
        size, sections = self._block_tokens, arrived.sections
        while self._clock.now() < until and (block := await arrived.next()):
            first = prefix.tokens // size
            codec = self._codec_for(block, first * size)
            if codec is None:
                return
            soon, ready, limit = True, None, DECODE_BLOCKS[prefix.kv.device.type]
            if sections is not None and block.header.sections and arrived.left <= LAST_BLOCKS:
                soon, ready = await self._coming_soon(arrived, sections)
            elif sections is not None:  # those that come by sections are a batch of their own
                limit = min(limit, max(1, arrived.left - LAST_BLOCKS))
            ends = ready is not None or (codec.layerwise and arrived.ends_within(LAST_BLOCKS))
            batch = arrived.take_like(block, LAST_BLOCKS if ends else limit)
            ids = [spec.tokens[(first + i) * size : (first + i + 1) * size] for i in range(len(batch))]
            coming = Coming(stop)
            decode = partial(self._decode_into, prefix.kv, first, batch, codec, ids, coming, ready)
            await self._decode_batch(prefix.kv, decode, coming, sections is not None and soon and ends and arrived.ends_within(0))
            prefix.kv.length = (first + len(batch)) * size
            self._account(prefix, batch)

    async def _coming_soon(self, arrived: Arrived, sections: Sections) -> tuple[bool, Layers]:
        """Whether the upper layers will have come before others are held up by a step that waits for them; and how to wait for them.

        It is told when the lowest of all blocks are there. The others are given the time of a few such.
        """
        began = self._clock.now()
        await arrived.all()
        now = self._clock.now()
        if (SECTIONS - 1) * (now - began) > HELD_S:
            return False, sections.wait
        return True, lambda layers: sections.wait(layers, now + MOST_HELD_S - self._clock.now())

    async def _decode_batch(self, kv: LiveKV, decode: Callable[[Layers], None], coming: Coming, by_layers: bool) -> None:
        """Decode blocks of one codec into their pages; with `by_layers` until some layers are there, and `kv.coming` tells of the rest."""
        loop = asyncio.get_running_loop()
        lower = loop.create_future()

        def on_layers(layers: int) -> None:
            coming.there(layers)
            if by_layers and not lower.done():
                loop.call_soon_threadsafe(lambda: lower.done() or lower.set_result(None))

        decoding = loop.run_in_executor(self._workers, decode, on_layers)
        try:
            await asyncio.wait([decoding, lower], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            coming.abandon(lambda: None)
            await asyncio.wait([decoding])  # until then its pages are written to, and must not be given back
            decoding.cancelled() or decoding.exception()  # nobody asks any more
            raise
        if decoding.done():
            decoding.result()
        else:
            kv.coming = coming
            decoding.add_done_callback(self._decoded)

    @torch.inference_mode()
    def _decode_into(
        self, kv: LiveKV, first: int, batch: list[EncodedBlock], codec: Codec, ids: list[Sequence[int]], coming: Coming,
        ready: Layers | None, on_layers: Layers,
    ) -> None:  # fmt: skip
        began, lost = self._clock.now(), True
        try:
            pages = kv.page_ids[first : first + len(batch)]
            kv.pool.fill(pages, lambda k, v, place: codec.decode(batch, tokens=ids, out=(k, v), on_layers=place, ready=ready), on_layers)
            lost = False
        finally:
            coming.end(lost)
        self._metrics.decode_seconds.labels(codec=codec.name).observe(self._clock.now() - began)

    def _fetched(self, task: asyncio.Task[int]) -> None:
        self._fetching.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a fetch failed in an unforeseen way", exc_info=error)

    def _decoded(self, decoding: asyncio.Future[None]) -> None:
        """What was begun to be computed with is there, or lost: then it is computed again (`Core`)."""
        error = decoding.exception()
        if isinstance(error, TransportError):
            log.info("blocks did not come to the end: %s", error)
            self._metrics.store_unavailable.labels(part="engine").inc()
        elif error is not None:
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


def _cancel(loop: asyncio.AbstractEventLoop, task: asyncio.Task[int]) -> None:
    """Cancel a task from any thread."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(task.cancel)
