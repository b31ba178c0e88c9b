"""From the engine's deltas to the wire, whole or in parts."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, AsyncIterator

from protos.concertina.inference.v1 import inference_pb2 as pb
from services.engine.base import Delta, ModelInfo

#: Tokens that come faster than this travel together: Serve's proxy moves about 1,400 messages a second, whatever their size.
FLUSH_S = 0.02


def chunk(request_id: str, delta: Delta) -> pb.GenerateChunk:
    """One part of a streamed answer; the last carries the reports."""
    message = pb.GenerateChunk(request_id=request_id, text=delta.text, tokens=delta.tokens, finish_reason=delta.finish_reason)
    if delta.finish_reason:
        _report(message, delta)
    return message


def response(request_id: str, delta: Delta) -> pb.GenerateResponse:
    """A whole answer, from all its deltas merged."""
    message = pb.GenerateResponse(request_id=request_id, text=delta.text, tokens=delta.tokens, finish_reason=delta.finish_reason)
    _report(message, delta)
    return message


def model_info(info: ModelInfo) -> pb.GetModelInfoResponse:
    """What is served."""
    layout = info.layout
    return pb.GetModelInfoResponse(
        model=info.model,
        fingerprint=info.fingerprint,
        context_window=info.context_window,
        vocab_size=info.vocab_size,
        dtype=str(layout.dtype).removeprefix("torch."),
        layers=layout.layers,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        kv_bytes_per_token=layout.bytes_per_token,
        block_tokens=info.block_tokens,
        codec=info.codec,
        presses=info.presses,
        engine=info.engine,
    )


def merge(first: Delta, second: Delta) -> Delta:
    """Two deltas that follow one another, as one. The reports are those of the second."""
    return Delta(
        text=first.text + second.text,
        tokens=first.tokens + second.tokens,
        finish_reason=second.finish_reason,
        prompt_tokens=second.prompt_tokens,
        completion_tokens=second.completion_tokens,
        cache=second.cache,
        timing=second.timing,
    )


async def whole(deltas: AsyncIterator[Delta]) -> Delta:
    """All deltas as one. Texts and tokens are collected first, so that a long answer costs linear time."""
    texts, tokens, last = [], [], Delta("", [])
    async for last in deltas:
        texts.append(last.text)
        tokens += last.tokens
    last.text, last.tokens = "".join(texts), tokens
    return last


async def coalesce(deltas: AsyncGenerator[Delta, None], flush_s: float = FLUSH_S) -> AsyncGenerator[Delta, None]:
    """The same deltas in fewer, larger ones: the first at once, then at most one every `flush_s` seconds.

    Closing it closes `deltas`. What waits is bounded by the request's own ``max_new_tokens``.
    """
    ready, waiting = asyncio.Event(), []

    async def pump() -> None:
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                waiting.append(delta)
                ready.set()

    task = asyncio.create_task(pump())
    task.add_done_callback(lambda _: ready.set())
    try:
        ended = False
        while not ended:
            await ready.wait()
            ready.clear()
            ended = task.done()
            if waiting:
                batch = functools.reduce(merge, waiting)
                waiting.clear()
                yield batch
                if not ended:
                    await asyncio.sleep(flush_s)
        task.result()
    finally:
        task.cancel()
        await asyncio.wait({task})


async def together(streams: list[AsyncGenerator[Delta, None]]) -> AsyncGenerator[tuple[int, Delta], None]:
    """Deltas of several answers as they come, each with the number of its stream. An error of one ends all; closing it closes all.

    What waits is bounded by the answers' lengths.
    """
    arrived: asyncio.Queue[tuple[int, Delta | asyncio.Task]] = asyncio.Queue()

    async def pump(number: int, stream: AsyncGenerator[Delta, None]) -> None:
        async with contextlib.aclosing(stream):
            async for delta in stream:
                arrived.put_nowait((number, delta))

    tasks = [asyncio.create_task(pump(n, s)) for n, s in enumerate(streams)]
    for number, task in enumerate(tasks):
        task.add_done_callback(lambda done, number=number: arrived.put_nowait((number, done)))
    try:
        running = len(tasks)
        while running:
            number, item = await arrived.get()
            if isinstance(item, Delta):
                yield number, item
            else:
                item.result()
                running -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _report(message: pb.GenerateChunk | pb.GenerateResponse, delta: Delta) -> None:
    cache, timing = delta.cache, delta.timing
    message.usage.prompt_tokens = delta.prompt_tokens
    message.usage.cached_tokens = cache.cached_tokens
    message.usage.completion_tokens = delta.completion_tokens
    for target, source in ((message.cache, cache), (message.timing, timing)):
        for field in target.DESCRIPTOR.fields:
            setattr(target, field.name, getattr(source, field.name))
