"""What Serve's proxy lacks, added in its own process: deadlines, prefixes for routing, and errors that say what to do.

Serve imports `add_services` by name (``grpc_servicer_functions``) in each proxy, under KubeRay too. From there each call of ours passes
through `_front` before Serve's own handler: it hands the caller's deadline on, which Serve drops, names the prompt's prefix for
`services.worker.router`, and puts the details of errors into gRPC's trailing metadata. Where a replica has died and only the proxy is
left to answer, it answers UNAVAILABLE with what is needed to go on, over HTTP in OpenAI's form.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import grpc
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from ray.serve._private import proxy
from ray.serve._private.grpc_util import set_grpc_code_and_details
from ray.serve._private.http_util import convert_object_to_asgi_messages
from ray.serve._private.proxy_request_response import ResponseStatus, gRPCProxyRequest, gRPCStreamingType

from protos.concertina.inference.v1 import inference_pb2 as pb
from protos.concertina.inference.v1.inference_pb2_grpc import add_InferenceServiceServicer_to_server
from services.worker.faults import RETRY_S, Details
from services.worker.openai import errors
from services.worker.prefixes import trail
from services.worker.service import TIMEOUT_HEADER

log = logging.getLogger(__name__)

_TASKS: set[asyncio.Task[None]] = set()
LOST_REASON = "REPLICA_LOST"
LOST = "the worker that had this request is gone; send the request again"
#: Serve's status of HTTP -> ours. 500 comes from a replica that died, since ours answer all that goes wrong in them.
STATUS_OF_HTTP = {408: "DEADLINE_EXCEEDED", 429: "RESOURCE_EXHAUSTED", 500: "UNAVAILABLE", 503: "UNAVAILABLE"}


def add_services(servicer: Any, server: Any) -> None:
    """Register our services with Serve's gRPC server; it adds reflection by itself."""
    _keep(_end_with(server))
    server.service_handler_factory = _front(server.service_handler_factory)
    proxy.send_http_response_on_exception = last_words
    add_InferenceServiceServicer_to_server(servicer, server)
    add_HealthServicer_to_server(servicer, server)


def _keep(work: Coroutine[Any, Any, None]) -> None:
    """Do it beside what runs. The loop itself would not keep the task alive."""
    task = asyncio.get_running_loop().create_task(work)
    _TASKS.add(task)
    task.add_done_callback(_TASKS.discard)


async def _drain(messages: AsyncIterator[Any]) -> None:
    """Read to the end."""
    async for _ in messages:
        pass


async def _end_with(server: Any) -> None:
    """gRPC ends a whole server for a call whose path is no UTF-8 (seen up to 1.85), and Serve would go on without.

    So the proxy ends too, and Serve starts another. A new server in this process would be there sooner, but calls to replicas, which
    share gRPC's queue with a server that ended so, may then crash.
    """
    try:
        await server.wait_for_termination()
    except UnicodeDecodeError as error:
        log.critical("gRPC's server was ended by what a caller sent (%s); this proxy ends, and another takes its place", error)
        os._exit(1)


def _front(factory: Callable[..., Callable]) -> Callable[..., Callable]:
    """Serve's factory of handlers, each with ours before it. Its handlers with streamed requests, which we have none of, stay.

    A call that is answered by one message goes round Serve's handler, which first writes its log and counts, and then answers.
    """

    serve = factory.__self__  # Serve's gRPCProxy

    def make(service_method: str, streaming_type: gRPCStreamingType) -> Callable:
        inner = factory(service_method=service_method, streaming_type=streaming_type)

        async def unary(request: Any, context: Any) -> bytes:
            call = Call(context, request)
            asked = gRPCProxyRequest(request, call, service_method, stream=False, streaming_type=streaming_type)
            messages = serve.proxy_request(asked)
            first = await anext(messages)
            if isinstance(first, ResponseStatus):
                await _drain(messages)
                set_grpc_code_and_details(call, first)
                call.end()
                return b""
            _keep(_drain(messages))  # Serve's own accounts, which nobody need wait for
            return first

        async def streamed(request: Any, context: Any) -> AsyncIterator[bytes]:
            call = Call(context, request)
            async for part in inner(request, call):
                call.note(part)
                yield part
            call.end()

        fronts = {gRPCStreamingType.UNARY_UNARY: unary, gRPCStreamingType.UNARY_STREAM: streamed}
        return fronts.get(streaming_type, inner)

    return make


class Call:
    """The context of one call: the server's own, but for what is added to its metadata and to its errors."""

    def __init__(self, context: Any, request: Any) -> None:
        self._context = context
        self._details: str = ""
        self._generates = isinstance(request, pb.GenerateRequest)
        self._tokens_sent = 0
        left_s = context.time_remaining()
        self._extra = [] if left_s is None else [(TIMEOUT_HEADER, f"{max(0.0, 1000 * left_s):.0f}")]
        if self._generates:
            # Serve has a place for a session in what a router sees, and none for a prefix.
            self._extra.append(("session_id", trail(request)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def invocation_metadata(self) -> list[tuple[str, Any]]:
        return [*self._extra, *(self._context.invocation_metadata() or ())]

    def set_details(self, details: str) -> None:
        self._details = details
        self._context.set_details(str(details))

    def note(self, part: bytes) -> None:
        """One message has gone to the caller."""
        if self._generates:
            self._tokens_sent += len(pb.GenerateChunk.FromString(part).tokens)

    def end(self) -> None:
        """Serve's handler is done; give an error its details."""
        code, details, metadata = self._context.code(), self._details, None
        if not code or code is grpc.StatusCode.OK:
            return
        if not isinstance(details, Details):
            if code is grpc.StatusCode.INTERNAL:  # of ours this has details
                code, details, metadata = grpc.StatusCode.UNAVAILABLE, self._lost(), {"tokens_sent": str(self._tokens_sent)}
            else:
                details = Details(details, code.name, RETRY_S.get(code.name))
            self._context.set_code(code)
            self._context.set_details(str(details))
        self._context.set_trailing_metadata((*self._context.trailing_metadata(), details.trailer(code, metadata)))

    def _lost(self) -> Details:
        after = f", with the {self._tokens_sent} tokens that came in `resume`, to go on behind them" if self._tokens_sent else ""
        return Details(LOST + after, LOST_REASON, RETRY_S["UNAVAILABLE"])


def last_words(status: Any, response_started: bool) -> list[dict[str, Any]]:
    """ASGI messages for a request over HTTP that no replica has answered to the end; none where the caller itself has gone."""
    name = STATUS_OF_HTTP.get(status.code)
    if name is None:
        return []
    kind, headers = errors.KINDS[name], dict(status.headers or ())
    body = errors.body(LOST if status.code == 500 else status.message, kind)
    if response_started:
        return [{"type": "http.response.body", "body": errors.event(body), "more_body": False}]
    for key, value in errors.retry_headers(RETRY_S.get(name)).items():
        headers.setdefault(key.encode(), value.encode())
    return convert_object_to_asgi_messages(body, kind.status, list(headers.items()))
