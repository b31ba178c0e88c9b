"""The engine `transformers`: continuous batching around any causal language model that transformers loads.

The event loop reads from the store and hands jobs to the model's thread (`services.engine.core`); deltas come back
through one `Stream` a request. Everything between the two is bounded: jobs by `max_batch + max_queue`, deltas by the answer's length.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvstore.client import ClientConfig, KvClient
from kvstore.clock import Clock, SystemClock
from kvstore.codecs import Codec, Profile
from kvstore.errors import CapacityError, DeadlineError, InvalidInputError
from kvstore.metrics import Metrics
from services.model import fingerprint

from . import cuda
from .base import Delta, Engine, GenerateSpec, ModelInfo
from .config import EngineConfig
from .core import Core
from .cpu import ROW_PRODUCTS
from .cpu.products import join_siblings
from .job import Job, Preempted, Prefix
from .live import LiveKV, LivePool, affordable_tokens
from .loading import Loaded, load
from .naming import BlockNames
from .prefixes import LivePrefixes
from .presses import PRESSES, create_press
from .presses.base import Press
from .rates import Rates
from .reader import StoreReader
from .remembered import machine, remembered_shapes
from .runner import Runner
from .sampler import Sampler
from .scheduler import Scheduler
from .seating import Seating
from .shapes import find_shapes, one_row, pages_needed, warm_up
from .textstream import TextStream
from .warm import ready_codec
from .writer import BlockWriter

#: Requests that may fetch their blocks and then wait for a slot, beyond those that run.
FETCH_AHEAD = 2
#: Time that `stop` gives to encoding and to publishing, each.
FLUSH_S = 5.0
log = logging.getLogger(__name__)


class TransformersEngine(Engine):
    """See the module.

    Parameters
    ----------
    config : EngineConfig
    store : ClientConfig, KvClient or None
        Where blocks come from and go to; None runs without a store. A client that is given is started and closed here, too.
    metrics : Metrics, optional
    clock : Clock, optional
    """

    name = "transformers"

    def __init__(
        self, config: EngineConfig, store: ClientConfig | KvClient | None = None, metrics: Metrics | None = None, clock: Clock | None = None
    ) -> None:
        self.config = config
        self.metrics = metrics or Metrics()
        self._store, self._clock = store, clock or SystemClock()
        self._client: KvClient | None = None
        self._reader: StoreReader | None = None
        self._ids = itertools.count()
        self._active = 0
        self._stopped = False

    async def start(self) -> None:
        config = self.config
        codec_name = config.codec
        self._workers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self._loaded, self._runner, digest, rate = await asyncio.to_thread(self._prepare)
        layout = self._loaded.layout
        codec = await asyncio.to_thread(ready_codec, codec_name, layout, config.profile, config.codec_options, config)
        self._rates = Rates(rate, config.store_floor_s, config.store_ceiling_s, config.always_fetch)
        self.info = ModelInfo(
            model=config.name or Path(config.model).name, fingerprint=digest, context_window=self._loaded.context_window,
            vocab_size=self._loaded.vocab_size, layout=layout, block_tokens=config.block_tokens, codec=codec_name,
            presses=tuple(PRESSES), engine=self.name,
        )  # fmt: skip
        if self._store is not None:
            self._client = self._store if not isinstance(self._store, ClientConfig) else KvClient(self._store, self.metrics, self._clock)
            await self._client.start()
            self._reader = StoreReader(
                self._client, codec, config.block_tokens, self._workers, self._rates, self.metrics, self._clock, self._runner.replays,
                self._unknown,
            )  # fmt: skip
        prefixes = LivePrefixes(self._runner.pool.pages)
        names = BlockNames(layout, digest, config.block_tokens)
        self._seating = Seating(self._runner.pool, prefixes, names, self._reader, config.max_batch + FETCH_AHEAD)
        self._core = self._build_core(codec, prefixes)
        self._core.start()

    def _prepare(self) -> tuple[Loaded, Runner, str, float]:
        """Load, fingerprint and warm up, outside the event loop; gives the prefill rate last, in tokens a second."""
        config = self.config
        if config.threads:
            torch.set_num_threads(config.threads)
        loaded = load(config)
        device, size = torch.device(config.device), config.block_tokens
        room = config.max_live_tokens or min(config.max_batch * loaded.context_window, affordable_tokens(loaded.layout, device))
        if not config.max_live_tokens:
            loaded = replace(loaded, context_window=min(loaded.context_window, room))
        runner = Runner(loaded.model, LivePool(loaded.layout, max(1, room // size), size, device))
        most = max(1, min(config.prefill_tiles, loaded.context_window // config.block_tokens))
        tiles = {min(most, config.busy_prefill_tiles), *(most >> halved for halved in range(most.bit_length()))}
        weights = sum(parameter.numel() for parameter in loaded.model.parameters())
        if rows := cuda.prefill_rows(device, runner.tile, most, config.prefill_rows, weights):
            tiles = set(range(1, rows // runner.tile + 1))
        digest = fingerprint(Path(config.model))
        facts = machine(config.device) | {
            "model": digest, "layout": str(loaded.layout), "tile": str(runner.tile), "tiles": str(sorted(tiles)),
            "batch": str(config.max_batch), "products": ROW_PRODUCTS, **cuda.facts(runner.pool, rows),
        }  # fmt: skip
        probe = Runner(loaded.model, LivePool(loaded.layout, pages_needed(tiles, config.max_batch), size, device))
        join_siblings(loaded.model, partial(one_row, probe))
        find = partial(find_shapes, probe, loaded.vocab_size, tiles, config.max_batch, self._clock, rows)
        runner.shapes, rate, known = remembered_shapes(facts, find)
        if known:
            probe.shapes = runner.shapes
            warm_up(probe, loaded.vocab_size)
        if config.cuda_graphs and runner.forwards is not None:
            from .cuda.recording import use_recordings

            use_recordings(runner, loaded.vocab_size, min(loaded.context_window, runner.pool.pages.total * size))
        return loaded, runner, digest, rate

    def _build_core(self, codec: Codec, prefixes: LivePrefixes) -> Core:
        config, shapes, loop = self.config, self._runner.shapes, asyncio.get_running_loop()
        writer = None
        if self._client is not None:
            client = self._client

            def deliver(blocks, input_tokens: int) -> None:
                loop.call_soon_threadsafe(partial(client.publish, blocks, input_tokens=input_tokens))

            def claim(keys, answer) -> None:
                asyncio.run_coroutine_threadsafe(client.claim(keys), loop).add_done_callback(lambda done: answer(_ours(done, len(keys))))

            # What waits to be encoded holds its pages: it is shed before requests have to wait for them.
            limit = min(config.publish_queue_blocks, max(1, self._runner.pool.pages.total // 4))
            writer = BlockWriter(codec, claim, deliver, limit, config.publish_share, self.metrics, self._clock)
        padded = shapes.prefill > 0  # a step costs the same with one tile as with all that it has places for
        busy = max(shapes.tiles) if padded else config.busy_prefill_tiles
        scheduler = Scheduler(config.max_batch, config.block_tokens, shapes.tiles, busy, shapes.rows, padded)
        return Core(self._runner, scheduler, prefixes, writer, self._loaded.eos, self._rates, self.metrics, self._clock)

    async def use_profile(self, profile: Profile, codec: str, options: dict[str, Any], *, write: bool) -> None:
        made = await asyncio.to_thread(ready_codec, codec, self.info.layout, profile, options, self.config)
        if self._reader is not None:
            self._reader.learn(made)
        if write:
            self._core.write_with(made)
            self.info = replace(self.info, codec=codec)

    def _unknown(self, number: int, profile: bytes) -> None:
        if self.on_unknown_profile is not None:
            self.on_unknown_profile(number, profile)

    async def stop(self) -> None:
        if self._stopped or not hasattr(self, "_core"):
            return
        self._stopped = True
        await asyncio.to_thread(self._core.stop, FLUSH_S)
        await asyncio.sleep(0)  # the last blocks' call_soon_threadsafe come before the flush
        if self._client is not None:
            await self._client.close(FLUSH_S)
        self._workers.shutdown(wait=False, cancel_futures=True)

    def tokenize(self, text: str) -> list[int]:
        return self._loaded.tokenizer.encode(text, add_special_tokens=False)

    def apply_chat_template(self, messages: list[dict[str, str]]) -> list[int]:
        tokenizer: Any = self._loaded.tokenizer
        if not tokenizer.chat_template:
            raise InvalidInputError(f"{self.info.model} has no chat template; send the prompt as text or tokens")
        try:
            return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        except (ValueError, TypeError, KeyError, *_template_errors()) as error:
            raise InvalidInputError(f"the model's chat template refuses this conversation: {error}") from error

    async def generate(self, spec: GenerateSpec) -> AsyncIterator[Delta]:
        arrived = self._clock.now()
        self._check(spec)
        limit = self.config.max_batch + self.config.max_queue
        if self._active >= limit:
            raise CapacityError(f"{limit} requests are running or waiting already; try again later")
        if self._stopped:
            raise CapacityError("the engine is stopping; send the request to another worker")
        self._active += 1
        stream = Stream(asyncio.get_running_loop())
        job = self._job(spec, stream, arrived)
        try:
            reason = ""
            while not reason:  # once, and again after each preemption
                async with contextlib.AsyncExitStack() as held:
                    job.press = self._press(spec)
                    async with _until(spec, self._clock):
                        await held.enter_async_context(self._seating.seat(job))
                    self._core.submit(job)
                    with contextlib.suppress(Preempted):
                        while not reason:
                            async with _until(spec, self._clock):
                                delta = await stream.next()
                            reason = delta.finish_reason
                            yield delta
        finally:
            self._active -= 1
            self._core.cancel(job.id)

    def _limit(self, spec: GenerateSpec) -> int:
        """Tokens of prompt and answer at most."""
        return min(len(spec.tokens) + spec.sampling.max_new_tokens, self.info.context_window)

    def _job(self, spec: GenerateSpec, stream: Stream, arrived: float) -> Job:
        seed, number = spec.sampling.seed, next(self._ids)
        press = self._press(spec)
        return Job(
            id=f"{number}", order=number, spec=spec, prefix=Prefix(LiveKV(self._runner.pool)), sink=stream.push, arrived=arrived,
            text=TextStream(self._loaded.tokenizer, spec.sampling.stop), compute=max(1, press.queries) if press else 1,
            sampler=Sampler(spec.sampling, self._clock.rng.getrandbits(64) if seed is None else seed),
            max_new_tokens=min(spec.sampling.max_new_tokens, self.info.context_window - len(spec.tokens)),
        )  # fmt: skip

    def _press(self, spec: GenerateSpec) -> Press | None:
        """A new press for the request; None where it would never have to drop anything."""
        press = create_press(spec.press, spec.kv_tokens)
        return None if press is None or self._limit(spec) <= press.budget else press

    def _check(self, spec: GenerateSpec) -> None:
        """What would break the model; the wire's checks are the caller's."""
        window, vocabulary = self.info.context_window, self.info.vocab_size
        if not spec.tokens:
            raise InvalidInputError("the prompt is empty; give at least one token")
        if len(spec.tokens) >= window:
            raise InvalidInputError(f"the prompt has {len(spec.tokens)} tokens; with room for an answer at most {window - 1} fit")
        if min(spec.tokens) < 0 or max(spec.tokens) >= vocabulary:
            raise InvalidInputError(f"the prompt has tokens outside the vocabulary; ids go from 0 to {vocabulary - 1}")
        most = self._runner.pool.pages.total * self.config.block_tokens
        if self._limit(spec) > most:
            raise InvalidInputError(f"{self._limit(spec)} tokens of prompt and answer are more than this worker's {most}; ask for less")
        if spec.sampling.max_new_tokens < 1:
            raise InvalidInputError(f"max_new_tokens must be at least 1, not {spec.sampling.max_new_tokens}")


class Stream:
    """Deltas of one request from the model's thread to the event loop; at most one a token of the answer."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[Delta | Exception] = asyncio.Queue()

    def push(self, item: Delta | Exception) -> None:
        """From any thread. What comes after the loop has closed is nobody's any more."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def next(self) -> Delta:
        """The next delta; raises the error that came instead."""
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item


@contextlib.asynccontextmanager
async def _until(spec: GenerateSpec, clock: Clock) -> AsyncIterator[None]:
    """Raise DeadlineError when what is inside is not done by the request's deadline. Never held over a yield to the caller."""
    left = None if spec.deadline is None else max(0.0, spec.deadline - clock.now())
    try:
        async with asyncio.timeout(left) as timeout:
            yield
    except TimeoutError as late:
        if not timeout.expired():
            raise
        raise DeadlineError("the request's deadline passed before its answer was whole") from late


def _ours(claimed: Future[list[bool]], count: int) -> list[bool]:
    """What came of a claim; all, where it could not be made before the loop ended."""
    return [True] * count if claimed.cancelled() or claimed.exception() else claimed.result()


def _template_errors() -> tuple[type[Exception], ...]:
    from jinja2.exceptions import TemplateError  # comes with transformers' chat templates only

    return (TemplateError,)
