"""The Ray Serve application: one actor a GPU, each with one engine, answering `InferenceService` through Serve's gRPC proxy and OpenAI's
HTTP through its HTTP proxy.

KubeRay names `services.worker.app:build` as ``import_path`` and gives the fields of `WorkerArgs` as ``args``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig, RequestRouterConfig
from ray.serve.grpc_util import RayServegRPCContext
from ray.util import get_node_ip_address
from starlette.requests import Request
from starlette.responses import Response

from kvstore.arena import settle_objects
from kvstore.clock import SystemClock
from kvstore.errors import CapacityError
from kvstore.metadata import WorkerRecord, connect
from kvstore.metrics import Metrics
from protos.concertina.inference.v1 import inference_pb2 as pb
from services.worker import responses
from services.worker.engines import create_engine, create_keeper
from services.worker.faults import RETRY_S
from services.worker.listen import bind_replica
from services.worker.metrics_page import MetricsPage
from services.worker.openai.http import OpenAiHttp
from services.worker.options import WorkerArgs
from services.worker.presence import Presence
from services.worker.same_host.server import open_beside_grpc
from services.worker.service import Service
from services.worker.tenants import Tenants

#: Function that Serve's proxies import to learn which methods there are.
SERVICER_FUNCTIONS = ("services.worker.proxy.add_services",)
#: Share of a core that a replica reserves. The model uses what the machine has; a whole core each would keep replicas from starting.
REPLICA_CPUS = 0.2
#: Requests are counted, not written down one by one: a line in two processes each takes longer than a message between them.
LOGGING = {"enable_access_log": False}
HEALTH_WATCH_S = 5.0
MAX_WATCHERS = 8
log = logging.getLogger(__name__)


def build(args: WorkerArgs) -> Application:
    """The application of `args` (a dict of the same fields will do)."""
    args = WorkerArgs.model_validate(args)
    gpus = 1 if args.device == "cuda" else 0
    return Worker.options(
        **_replicas(args),
        max_ongoing_requests=args.max_requests,
        max_queued_requests=4 * args.max_requests,
        graceful_shutdown_timeout_s=args.drain_s,
        # A new replica serves before an old one goes; not where it would wait for a GPU that only the old one can give.
        max_surge_percent=0 if gpus else 100,
        ray_actor_options={"num_gpus": gpus, "num_cpus": REPLICA_CPUS},
    ).bind(args)


def _replicas(args: WorkerArgs) -> dict[str, Any]:
    """How many replicas: fixed, or as many as the requests that wait and run ask for."""
    low, high = args.min_replicas or args.replicas, args.max_replicas or args.replicas
    if low == high:
        return {"num_replicas": low}
    target = AutoscalingConfig(
        min_replicas=low,
        max_replicas=high,
        initial_replicas=args.replicas,
        target_ongoing_requests=args.target_requests,
    )
    return {"autoscaling_config": target}


# A constructor that fails, fails again: what it was told is wrong. Redis and nodes may be away without that.
@serve.deployment(
    max_constructor_retry_count=1,
    graceful_shutdown_wait_loop_s=0.5,
    health_check_period_s=5,
    request_router_config=RequestRouterConfig(request_router_class="services.worker.router.PrefixRouter"),
    logging_config=LOGGING | {"log_level": "WARNING"},  # of Serve's own lines in a replica, one a request, made even where none is written
    backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_S["RESOURCE_EXHAUSTED"]),
)
class Worker:
    """One replica. Its methods are the RPCs of `InferenceService` and of `grpc.health.v1.Health`, by name."""

    async def __init__(self, args: WorkerArgs) -> None:
        if args.internal_host:
            bind_replica(args.internal_host)
        open_beside_grpc()
        self._metrics = Metrics()
        self._page = MetricsPage(self._metrics.registry, args.metrics)
        self._engine = create_engine(args, self._metrics)
        self._service = Service(self._engine, Tenants.load(args.tenants), self._metrics)
        self._http = OpenAiHttp(self._service)
        self._keeper = create_keeper(args, self._engine)
        self._presence: Presence | None = None
        self._watchers = 0
        await self._engine.start()
        await self._keeper.start()
        self._page.start()
        if args.redis:
            record = self._record(args)
            self._presence = Presence(connect(args.redis), lambda: replace(record, codec=self._engine.info.codec), self._metrics)
            await self._presence.start()
        settle_objects()
        log.info("worker of %s is ready", self._engine.info.model)

    async def __del__(self) -> None:
        """Serve's hook for the end of a replica: leave the membership, end a calibration, flush what is to be published, free the model."""
        if self._presence:
            await self._presence.stop()
        await self._keeper.stop()
        await self._engine.stop()
        self._page.stop()

    async def __call__(self, request: Request) -> Response:
        """HTTP, in OpenAI's form."""
        return await self._http.answer(request)

    async def Generate(self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext) -> pb.GenerateResponse:
        """Answer in one message."""
        with self._answering(grpc_context):
            async with contextlib.aclosing(self._service.deltas(request, grpc_context.invocation_metadata())) as deltas:
                return responses.response(request.request_id, await responses.whole(deltas))

    async def GenerateStream(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        """Answer in parts."""
        with self._answering(grpc_context):
            parts = responses.coalesce(self._service.deltas(request, grpc_context.invocation_metadata()))
            async with contextlib.aclosing(parts) as deltas:
                async for delta in deltas:
                    yield responses.chunk(request.request_id, delta)

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, grpc_context: RayServegRPCContext
    ) -> pb.GetModelInfoResponse:
        """Say what is served."""
        with self._answering(grpc_context):
            self._service.tenants.of(grpc_context.invocation_metadata())
            return responses.model_info(self._engine.info)

    async def Check(self, request: health_pb2.HealthCheckRequest) -> health_pb2.HealthCheckResponse:
        """Healthy when called: Serve sends calls only to replicas whose engine has started."""
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """The same at once and then every few seconds, until the caller goes. Bounded in number: each takes a request's place."""
        with self._answering(grpc_context):
            if self._watchers >= MAX_WATCHERS:
                raise CapacityError(f"{MAX_WATCHERS} callers watch this worker's health already; ask Check now and then instead")
            self._watchers += 1
            try:
                while True:
                    yield await self.Check(request)
                    await asyncio.sleep(HEALTH_WATCH_S)
            finally:
                self._watchers -= 1

    @contextlib.contextmanager
    def _answering(self, context: RayServegRPCContext) -> Iterator[None]:
        """Count the call by its status, and put an error's status and details on the wire."""
        with self._service.counted():
            try:
                yield
            except Exception as error:
                code, details = self._service.fault(error)
                context.set_code(grpc.StatusCode[code])
                context.set_details(details)
                raise

    def _record(self, args: WorkerArgs) -> WorkerRecord:
        info = self._engine.info
        return WorkerRecord(
            id=f"worker-{SystemClock().rng.getrandbits(32):08x}",
            address=args.address,
            http=args.http or None,
            metrics=_reachable(self._page.address),
            pid=os.getpid(),
            engine=info.engine,
            device=args.device,
            model=info.model,
            codec=info.codec,
        )


def _reachable(address: str | None) -> str | None:
    """`address` with this machine's own in place of a host that stands for all of them."""
    host, _, port = (address or "").rpartition(":")
    return f"{get_node_ip_address()}:{port}" if host in ("0.0.0.0", "::") else address
