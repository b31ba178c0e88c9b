"""Checks of what was typed, before anything is started. Each raises ConfigError, which ends a command with exit status 2."""

from __future__ import annotations

import contextlib
import ctypes
import socket
from pathlib import Path

from kvstore.clock import SystemClock
from kvstore.errors import ConfigError
from kvstore.settings import format_size, parse_size

MIN_ARENA_BYTES = 1 << 20
DEVICES = ("cpu", "cuda")


def check_codec(name: str) -> None:
    from kvstore.codecs import CODECS

    _one_of("codec", name, CODECS)


def check_profile(path: str | None) -> None:
    if path is not None and not Path(path).is_file():
        raise ConfigError(f"--profile {path}: no such file; make one with `concertina calibrate --out {path}`")


def check_policy(name: str) -> None:
    from kvstore.eviction import POLICIES, create_online

    _one_of("policy", name, POLICIES)
    create_online(name)


def check_engine(name: str) -> None:
    from services.engine import ENGINES

    _one_of("engine", name, ENGINES)


def check_device(name: str, replicas: int = 1) -> None:
    """Known, and for ``cuda`` there, one for each of `replicas` workers."""
    _one_of("device", name, DEVICES)
    if name != "cuda":
        return
    count = gpu_count()
    if not count:
        raise ConfigError("--device cuda: no GPU, or no NVIDIA driver, on this machine; use --device cpu")
    if replicas > count:
        raise ConfigError(f"--device cuda: {replicas} workers want a GPU each and there are {count}; give --workers {count}")


def gpu_count() -> int:
    """GPUs that this process may use, as the driver says (which heeds CUDA_VISIBLE_DEVICES); none of them is made busy by asking."""
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    return 0 if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) else count.value


def check_redis(url: str | None) -> None:
    if url is not None:
        from kvstore.metadata import BACKENDS

        if url.partition("://")[0] not in BACKENDS:
            raise ConfigError(f"--redis {url!r} is no URL of a Redis; write it as redis://HOST:PORT/0")


def check_count(option: str, value: float, low: int, high: int = 1024) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{option} must be from {low} to {high}, not {value}")


def check_replicas(workers: int, low: int | None, high: int | None) -> None:
    """Number of workers, and the bounds between which it may move."""
    check_count("--workers", workers, 1)
    check_count("--min-workers", low or workers, 1, workers)
    check_count("--max-workers", high or workers, workers)


def check_ratio(ratio: float | None) -> None:
    if ratio is not None and not 1.0 < ratio <= 1000.0:
        raise ConfigError(f"--ratio must be above 1 and at most 1000, not {ratio:g}")


def check_tenants(path: str | None) -> None:
    from services.worker.tenants import Tenants

    Tenants.load(path)


def check_arena(text: str, nodes: int, device: str) -> int:
    """Bytes of one node's arena. On the CPU, those of all nodes together must fit the memory that is free."""
    size = parse_size(text)
    if size < MIN_ARENA_BYTES:
        raise ConfigError(f"--arena {text} is too small; give at least {format_size(MIN_ARENA_BYTES)}")
    if device == "cpu":
        import psutil

        available = psutil.virtual_memory().available
        if size * nodes > available:
            raise ConfigError(
                f"--arena {text} for {nodes} node(s) is more than the {format_size(available)} of memory that is free; "
                f"give at most {format_size(available // max(1, nodes))}"
            )
    return size


def check_listen(text: str, option: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; port 0 becomes a free one. A port that is taken is refused."""
    host, colon, port = text.rpartition(":")
    host = host.strip("[]")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{option} {text!r} is no address; write it as HOST:PORT, such as 127.0.0.1:9000")
    try:
        return host, bound_port(host, int(port))
    except OSError as error:
        raise ConfigError(f"{option} {text}: {error.strerror or error}; choose another address, or port 0 for a free one") from error


def bound_port(host: str, port: int) -> int:
    """`port`, or a free one for 0, after a trial bind. Raises OSError where it is taken.

    A free one is drawn below the range from which the kernel gives ports to outgoing connections, which may be many before ours is
    bound for good.
    """
    if port:
        _try_bind(host, port)
        return port
    draw = SystemClock().rng
    for _ in range(100):
        candidate = draw.randrange(20_000, 32_000)
        with contextlib.suppress(OSError):
            _try_bind(host, candidate)
            return candidate
    raise OSError(f"no free port on {host}")


def _try_bind(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        trial.bind((host, port))


def local_model(name: str) -> Path:
    """Directory of the model that `name` means."""
    from services.model import resolve_model

    return resolve_model(name)


def _one_of(kind: str, name: str, known: dict[str, str] | tuple[str, ...]) -> None:
    if name not in known:
        raise ConfigError(f"unknown {kind} {name!r}; known: {', '.join(known)}")
