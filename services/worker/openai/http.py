"""The HTTP face of a worker: routes, whole and streamed answers, errors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from kvstore.errors import ConcertinaError, TransportError
from services.engine.base import Delta
from services.worker import responses
from services.worker.service import Service

from . import bodies, errors
from .parse import Wanted, parse

#: Of a body, before it is parsed; the same as a gRPC message may have.
MAX_BODY_BYTES = 16 << 20
#: Path -> method, and the name of what answers it.
ROUTES: dict[str, tuple[str, str]] = {
    "/health": ("GET", "health"),
    "/v1/models": ("GET", "models"),
    "/v1/completions": ("POST", "completions"),
    "/v1/chat/completions": ("POST", "chat"),
}
log = logging.getLogger(__name__)


class OpenAiHttp:
    """Answers requests of Serve's HTTP proxy.

    Parameters
    ----------
    service : Service
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._since = int(service.clock.wall())

    async def answer(self, request: Request) -> Response:
        """The response; never raises but for cancellation."""
        try:
            async with contextlib.AsyncExitStack() as call:
                call.enter_context(self._service.counted())
                return await self._route(request, call)
        except ConcertinaError as error:
            return self._refusal(error)
        except Exception as error:
            log.exception("a request over HTTP failed")
            return self._refusal(error)

    async def _route(self, request: Request, call: contextlib.AsyncExitStack) -> Response:
        path = request.url.path.rstrip("/")
        if path.startswith("/v1/models/"):
            return self._model(request, path.removeprefix("/v1/models/"))
        if path not in ROUTES:
            raise errors.HttpError(404, f"there is no {path or '/'} here; known: {', '.join(ROUTES)}")
        method, name = ROUTES[path]
        if request.method != method:
            raise errors.HttpError(405, f"{path} takes {method}, not {request.method}")
        if name == "health":
            return Response()
        if name == "models":
            self._service.tenants.of(request.headers.items())
            return JSONResponse(bodies.models([self._service.engine.info.model], self._since))
        return await self._complete(request, call, chat=name == "chat")

    def _model(self, request: Request, name: str) -> Response:
        self._service.tenants.of(request.headers.items())
        served = self._service.engine.info.model
        if name != served:
            raise errors.UnknownModelError(f"the model {name!r} does not exist here; use {served!r}")
        return JSONResponse(bodies.model(served, self._since))

    async def _complete(self, request: Request, call: contextlib.AsyncExitStack, *, chat: bool) -> Response:
        headers, clock = request.headers.items(), self._service.clock
        self._service.tenants.of(headers)  # who may not call need not be told what is wrong with the body
        model = self._service.engine.info.model
        wanted = parse(await _body(request), model, chat=chat)
        objects = (bodies.Chat if chat else bodies.Completion)(f"{clock.rng.getrandbits(96):024x}", int(clock.wall()), model)
        streams = [self._service.deltas(made, headers) for made in wanted.requests]
        if not wanted.stream:
            return JSONResponse(objects.whole(await _whole(streams)))
        parts = await call.enter_async_context(contextlib.aclosing(responses.together([responses.coalesce(s) for s in streams])))
        first = await anext(parts)  # what is refused is refused with a status, before the stream begins
        lines = self._events(objects, wanted, first, parts, call.pop_all())
        return StreamingResponse(lines, media_type="text/event-stream", headers={"cache-control": "no-cache"})

    async def _events(
        self, objects: bodies.Completion | bodies.Chat, wanted: Wanted, first: tuple[int, Delta],
        rest: AsyncIterator[tuple[int, Delta]], call: contextlib.AsyncExitStack,
    ) -> AsyncGenerator[bytes, None]:  # fmt: skip
        """Server-sent events of one call; an error on the way is the last of them."""
        lasts: dict[int, Delta] = {}
        extra = {"usage": None} if wanted.include_usage else {}
        try:
            async with call:
                for chunk in objects.opening():
                    yield errors.event(chunk | extra)
                async for index, delta in _after(first, rest):
                    _check_finished(delta)
                    if delta.finish_reason:
                        lasts[index] = delta
                    for chunk in objects.chunks(index, delta):
                        yield errors.event(chunk | extra)
                if wanted.include_usage:
                    yield errors.event(objects.closing(list(lasts.values())))
                yield b"data: [DONE]\n\n"
        except ConcertinaError as error:
            yield errors.event(self._body(error)[0])
        except Exception as error:
            log.exception("a stream over HTTP failed")
            yield errors.event(self._body(error)[0])

    def _refusal(self, error: Exception) -> Response:
        body, kind, retry_s = self._body(error)
        return JSONResponse(body, getattr(error, "status", kind.status), errors.retry_headers(retry_s))

    def _body(self, error: Exception) -> tuple[dict[str, Any], errors.Kind, float | None]:
        """OpenAI's error object for what was raised, its kind, and the delay after which to try again."""
        code, details = self._service.fault(error)
        kind = errors.KINDS.get(code, errors.INTERNAL)
        body = errors.body(str(details), kind, getattr(error, "param", None), getattr(error, "code", None))
        return body, kind, details.retry_s


async def _body(request: Request) -> bytes:
    """The body, bounded. Raises HttpError beyond that."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise errors.HttpError(413, f"the body has more than {MAX_BODY_BYTES} bytes; shorten the prompt")
        parts.append(part)
    return b"".join(parts)


async def _whole(streams: list[AsyncGenerator[Delta, None]]) -> list[Delta]:
    """All answers; the first that fails ends the others."""
    tasks = [asyncio.create_task(responses.whole(s)) for s in streams]
    try:
        answers = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for answer in answers:
        _check_finished(answer)
    return answers


async def _after(first: tuple[int, Delta], rest: AsyncIterator[tuple[int, Delta]]) -> AsyncIterator[tuple[int, Delta]]:
    yield first
    async for item in rest:
        yield item


def _check_finished(delta: Delta) -> None:
    """An answer that the worker broke off is none of OpenAI's ways to finish."""
    if delta.finish_reason == "cancelled":
        raise TransportError("the worker is stopping and broke the answer off; send the request again")
