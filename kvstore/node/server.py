"""The node's gRPC server, built from `HANDLERS`. Deadline, error mapping and timing of every RPC are written here, once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvstore.bulk import BULK_OPTIONS
from kvstore.clock import Clock
from kvstore.errors import ConcertinaError, ConfigError, DeadlineError, status_name
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from .config import MAX_FRAME_BYTES, NodeConfig
from .handlers import HANDLERS, Handler, handler_class
from .handlers.base import Service
from .tls import server_credentials

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["KVStoreService"]
#: A message is a payload, a header and the names of the fields.
MAX_MESSAGE_BYTES = MAX_FRAME_BYTES + (64 << 10)
ERROR_DOMAIN = "concertina"
#: Between attempts to listen again.
REOPEN_S = 0.1


class Server:
    """gRPC on one port: the store, health checking and reflection.

    Parameters
    ----------
    config : NodeConfig
    service : Service
    clock : Clock
    """

    def __init__(self, config: NodeConfig, service: Service, clock: Clock) -> None:
        self._service = service
        self._clock = clock
        self._tls = server_credentials(config)
        self._health = health.aio.HealthServicer()
        self._max_streams = config.max_streams
        self._methods = {rpc: self._method(rpc) for rpc in HANDLERS}
        self._server: grpc.aio.Server
        self._keeper: asyncio.Task[None]
        self._ending = False

    async def start(self, listen: str) -> int:
        """Bind and serve; returns the port.

        Raises
        ------
        ConfigError
            If the address cannot be bound.
        """
        try:
            port = await self._open(listen)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {listen}: {error}; give --listen a free HOST:PORT, or port 0") from error
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        self._keeper = asyncio.create_task(self._keep_open(f"{listen.rpartition(':')[0]}:{port}"))
        return port

    async def _open(self, listen: str) -> int:
        """A new gRPC server on this address; returns its port. Raises RuntimeError where it cannot be bound."""
        server = grpc.aio.server(
            maximum_concurrent_rpcs=self._max_streams,
            options=[
                *BULK_OPTIONS,
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # else two nodes could share one port without noticing
                ("grpc.max_metadata_size", 16 << 10),
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
            ],
        )
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE.full_name, self._methods)])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        port = server.add_insecure_port(listen) if self._tls is None else server.add_secure_port(listen, self._tls)
        await server.start()
        self._server = server
        return port

    async def _keep_open(self, address: str) -> None:
        """gRPC ends a whole server for a call whose path is no UTF-8 (seen up to 1.85), so a new one takes its place."""
        while not self._ending:
            try:
                await self._server.wait_for_termination()
            except UnicodeDecodeError as error:
                log.warning("gRPC's server was ended by what a caller sent (%s); a new one takes its place", error)
            ended = self._server
            await ended.stop(None)  # to the end, at which gRPC has not arrived
            while self._server is ended and not self._ending:
                try:
                    await self._open(address)
                except RuntimeError as error:  # of the old one the port may not be free yet
                    log.warning("cannot listen on %s again yet: %s", address, error)
                    await asyncio.sleep(REOPEN_S)

    async def drain(self) -> None:
        """Tell health checkers that no more calls are wanted."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float) -> None:
        """End: running calls have `grace_s` seconds to finish, then they are cancelled."""
        self._ending = True
        await self._server.stop(grace_s)
        await self._keeper
        await self._server.stop(None)  # should it be a new one

    async def _set_health(self, status: Any) -> None:
        for name in ("", SERVICE.full_name):
            await self._health.set(name, status)

    def _method(self, rpc: str) -> grpc.RpcMethodHandler:
        cls = handler_class(rpc)
        return cls.register(self._guarded(rpc, cls(self._service)))

    def _guarded(self, rpc: str, handler: Handler) -> Callable:
        seconds = self._service.metrics.rpc_seconds.labels(rpc=rpc)

        async def call(request: Any, context: grpc.aio.ServicerContext) -> bytes | None:
            started = self._clock.now()
            try:
                async with asyncio.timeout(handler.timeout_s):
                    self._service.caller(context)  # whatever the handler is: no call without a credential, where one is asked for
                    return await handler.call(request, context)
            except TimeoutError:
                error = DeadlineError(f"{rpc} took longer than {handler.timeout_s:g} s; ask for less in one call")
            except ConcertinaError as raised:
                error = raised
            except grpc.aio.InternalError:
                log.debug("the caller of %s went away", rpc)
                return None
            except Exception as raised:
                log.exception("%s failed", rpc)
                error = ConcertinaError(f"{rpc} failed inside the node ({type(raised).__name__}); see the node's log")
            finally:
                seconds.observe(self._clock.now() - started)
            await _abort(context, error)

        return call


async def _abort(context: grpc.aio.ServicerContext, error: ConcertinaError) -> None:
    """End a call with the status of `error`, its message, and its reason as ``google.rpc.ErrorInfo``."""
    code = grpc.StatusCode[status_name(error)]
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN))
    status = status_pb2.Status(code=code.value[0], message=str(error), details=[detail])
    await context.abort(code, str(error), (("grpc-status-details-bin", status.SerializeToString()),))
