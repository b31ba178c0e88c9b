"""``concertina worker``: inference workers in a Ray of their own, until SIGTERM. SIGUSR1 renews them without losing a request."""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from kvstore import errors
from kvstore.errors import ConcertinaError, TransportError
from services.system.checks import (
    check_codec,
    check_count,
    check_device,
    check_engine,
    check_listen,
    check_profile,
    check_redis,
    check_replicas,
    local_model,
)

if TYPE_CHECKING:
    from services.worker.options import WorkerArgs

READY_TIMEOUT_S = 60.0
APPLICATION = "concertina"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="", metavar="DIR|HUB-NAME", help="model to serve (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--redis", metavar="URL", help="metadata of the store's cluster; without it there is no store")
    parser.add_argument("--listen", default="127.0.0.1:9000", metavar="HOST:PORT", help="gRPC address, port 0 for a free one (%(default)s)")
    parser.add_argument("--http", default="127.0.0.1:0", metavar="HOST:PORT", help="address of OpenAI-compatible HTTP (%(default)s)")
    parser.add_argument("--metrics", default="127.0.0.1:0", metavar="HOST:PORT", help="metrics page of the first replica (%(default)s)")
    parser.add_argument("--codec", default="transform", help="codec that new blocks are written with (%(default)s)")
    parser.add_argument("--profile", metavar="FILE", help="profile for the codec (default: found, or made in the background)")
    parser.add_argument("--ratio", type=float, help="compression ratio that the codec is asked for, where it can be")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="replicas, one a GPU (%(default)s)")
    parser.add_argument("--min-workers", type=int, metavar="N", help="let their number follow the requests, not below this")
    parser.add_argument("--max-workers", type=int, metavar="N", help="nor above this (default: --workers)")
    parser.add_argument("--drain", type=float, default=10.0, metavar="S", help="time for a replica to finish its answers (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--engine", default="transformers", help="what runs the model (%(default)s)")
    parser.add_argument("--tenants", metavar="FILE", help="JSON of token digests and tenants; calls then need a bearer token")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="short path for Ray's sockets and logs (default: below /tmp)")


def run(args: argparse.Namespace) -> int:
    check_codec(args.codec)
    check_profile(args.profile)
    check_engine(args.engine)
    check_device(args.device, max(args.workers, args.max_workers or 0))
    check_redis(args.redis)
    host, port = check_listen(args.listen, "--listen")
    http = "{}:{}".format(*check_listen(args.http, "--http"))
    check_listen(args.metrics, "--metrics")
    check_replicas(args.workers, args.min_workers, args.max_workers)
    check_count("--drain", args.drain, 0, 3600)
    model = local_model(args.model)
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    try:
        return _serve(args, model, f"{host}:{port}", http)
    except _Ended:
        return 0


class _Ended(BaseException):
    """SIGTERM or SIGINT came; unwinds whatever is going on, Ray's start included."""


def _interrupt(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise _Ended


def _serve(args: argparse.Namespace, model: Path, grpc: str, http: str) -> int:
    from services.worker.private_ray import private_ray

    most = max(args.workers, args.max_workers or 0)
    threads = max(1, (os.cpu_count() or 1) // most)
    gpus = most if args.device == "cuda" else 0
    renewals: queue.SimpleQueue[int] = queue.SimpleQueue()
    with private_ray(args.scratch, cpus=most, gpus=gpus, threads=threads):
        signal.signal(signal.SIGTERM, _interrupt)  # Ray has put its own in place
        signal.signal(signal.SIGUSR1, lambda signum, frame: renewals.put(signum))
        arguments = _arguments(args, model, grpc, http)
        _start(arguments, grpc, http)
        ready = {"inference": grpc, "http": f"http://{http}", "model": model.name, "codec": args.codec, "workers": args.workers}
        print(json.dumps(ready | {"pid": os.getpid()}))
        sys.stdout.flush()
        while renewals.get():
            arguments = arguments.model_copy(update={"generation": arguments.generation + 1})
            _renew(arguments)
    return 0


def _arguments(args: argparse.Namespace, model: Path, grpc: str, http: str) -> WorkerArgs:
    """What each replica is told; `grpc` and `http` are ``host:port``."""
    from services.worker.options import WorkerArgs

    return WorkerArgs(
        model=str(model),
        redis=args.redis,
        engine=args.engine,
        codec=args.codec,
        profile=args.profile and str(Path(args.profile).absolute()),
        ratio=args.ratio,
        device=args.device,
        replicas=args.workers,
        min_replicas=args.min_workers,
        max_replicas=args.max_workers,
        drain_s=args.drain,
        address=grpc,
        http=f"http://{http}",
        metrics=args.metrics,
        internal_host="127.0.0.1",
        tenants=args.tenants,
    )


def _renew(arguments: WorkerArgs) -> None:
    """Put new replicas in the place of the old ones, which answer until then. Where that fails, the old ones stay."""
    print("concertina worker: renewing the replicas", file=sys.stderr, flush=True)
    try:
        _deploy(arguments)
    except ConcertinaError as error:
        print(f"concertina worker: the replicas were not renewed: {error}", file=sys.stderr, flush=True)


def _start(arguments: WorkerArgs, grpc: str, http: str) -> None:
    """Start Serve and the application in the Ray that runs, and wait until it answers at both addresses (``host:port``)."""
    from ray import serve

    from services.worker.app import LOGGING, SERVICER_FUNCTIONS
    from services.worker.listen import GrpcListen

    (host, port), (http_host, http_port) = (_split(address) for address in (grpc, http))
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": http_host, "port": http_port},
        logging_config=LOGGING,
        grpc_options=GrpcListen(host=host, port=port, grpc_servicer_functions=list(SERVICER_FUNCTIONS)),
    )
    _deploy(arguments)
    _wait_until_it_answers(grpc)


def _deploy(arguments: WorkerArgs) -> None:
    """Bring the replicas to what `arguments` say, and wait for it."""
    from ray import serve

    from services.worker.app import build

    try:
        serve.run(build(arguments), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise _cause(str(error)) from error


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def _cause(message: str) -> ConcertinaError:
    """Our own error that kept a replica from starting, out of the traceback that Serve gives as text."""
    found = re.findall(r"^kvstore\.errors\.(\w+): (.*)$", message, re.MULTILINE)
    kind = getattr(errors, found[-1][0], None) if found else None
    if isinstance(kind, type) and issubclass(kind, ConcertinaError):
        return kind(found[-1][1])
    return TransportError(f"the worker did not start: {message}")


def _wait_until_it_answers(address: str) -> None:
    """The proxy learns of the application a moment after Serve calls it ready."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    deadline = time.monotonic() + READY_TIMEOUT_S
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while True:
            try:
                stub.Check(health_pb2.HealthCheckRequest(), timeout=2, wait_for_ready=True)
                return
            except grpc.RpcError as error:
                if time.monotonic() > deadline:
                    raise TransportError(f"the gRPC proxy at {address} does not answer: {error.code().name}") from error
                time.sleep(0.1)
