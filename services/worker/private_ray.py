"""One Ray of our own: head and only node, loopback only, gone when we are.

The processes that `ray.init` starts die with us, even by SIGKILL: Ray sets their parent-death signal on Linux, and workers end
with their raylet.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kvstore.errors import ConfigError, TransportError
from kvstore.settings import set_environment

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 100 << 20
START_ATTEMPTS = 2
#: A Unix socket's path may have 107 bytes; Ray puts about 70 below its directory.
MAX_DIRECTORY_BYTES = 36
#: OpenMP threads that wait for work by spinning take the cores from the store's nodes and from Ray, and a step takes seven times as
#: long; so they sleep. Torch reads that when it is imported.
THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
#: Ray reads these when it is imported. The fourth has it take 127.0.0.1 as the node's address, which on Linux it would otherwise
#: replace by the machine's own and so open its ports to the network. The next two have it start a process when it is needed, not
#: ahead, and the one after has actors run at our own priority: Ray's default of 15 has the model wait for everything else on the
#: machine. RAY_SERVE_GRPC_MAX_MESSAGE_SIZE bounds a message before it is read, at far more than any prompt takes, and a proxy that is
#: gone is known to be after three looks, one a second instead of one in ten. The last five are about time: the proxy calls replicas
#: over gRPC instead of as actors, which costs 3 ms a call more; neither has a thread of its own for what is asynchronous here anyway;
#: Ray's own metrics leave a process once a second instead of ten times; and gRPC reads its sockets in the thread that waits for
#: calls, not in one of a pool that wakes it (a gRPC without these experiments says so and goes on).
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_ADDRESS": "",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_worker_niceness": "0",
    "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(16 << 20),
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
    "GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener",
}


@contextlib.contextmanager
def private_ray(directory: Path | None, cpus: float, gpus: int, threads: int) -> Iterator[None]:
    """Run Ray for the length of a ``with`` block, and Serve with whatever the block starts in it.

    Parameters
    ----------
    directory : Path or None
        Short and its own: sockets, logs and the token go there, and it is removed at the end. None makes one.
    cpus : float
        Cores that its actors reserve in sum; a number for Ray's accounts, it binds nothing.
    gpus : int
        GPUs that its actors may take.
    threads : int
        Threads that torch uses in an actor. Ray would set one for an actor that reserves less than two cores.

    Raises
    ------
    ConfigError
        For a directory whose path is too long.
    """
    directory = directory or Path(tempfile.mkdtemp(prefix="cct-", dir=_short_tmp()))
    if len(str(directory)) > MAX_DIRECTORY_BYTES:
        raise ConfigError(f"{directory} is too long a path for Ray's sockets; give one of at most {MAX_DIRECTORY_BYTES} bytes")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    token = directory / "token"
    with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    set_environment({**ENVIRONMENT, **THREADS, "RAY_AUTH_TOKEN_PATH": str(token), "OMP_NUM_THREADS": str(threads)})
    import ray  # only now: see ENVIRONMENT
    from ray import serve

    try:
        _start_ray(directory, cpus, gpus)
        yield
    finally:
        if ray.is_initialized():
            serve.shutdown()
        ray.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


def _start_ray(directory: Path, cpus: float, gpus: int) -> None:
    """Ray gives its own parts 30 s, with no setting for it; a machine that compiles Python for the first time may need more."""
    import ray

    for left in reversed(range(START_ATTEMPTS)):
        try:
            ray.init(
                address="local",
                num_cpus=max(1, round(cpus + 0.5)),
                num_gpus=gpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="warning",
                namespace="concertina",
                _node_ip_address="127.0.0.1",
                _temp_dir=str(directory),
            )
            return
        except Exception as error:  # Ray raises a bare one
            ray.shutdown()
            if not left:
                raise TransportError(f"Ray did not start in {START_ATTEMPTS} attempts: {error}; is the machine overloaded?") from error
            log.warning("Ray did not start, trying once more: %s", error)


def _short_tmp() -> str:
    """The temporary directory, unless its path is too long for sockets below it."""
    usual = tempfile.gettempdir()
    return usual if len(usual) + len("/cct-12345678") <= MAX_DIRECTORY_BYTES else "/tmp"
