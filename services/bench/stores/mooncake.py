"""Mooncake Store over TCP: a master, a holder process with the memory, and clients without any, so that bytes really travel."""

from __future__ import annotations

import ctypes
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from kvstore.errors import TransportError
from kvstore.settings import environment

from .base import Store, Values
from .party import free_port, wait_for_port, working


def missing() -> str | None:
    """Why it cannot be run here; None where it can."""
    if shutil.which("mooncake_master") is None:
        return "mooncake-transfer-engine-non-cuda is not installed (its command mooncake_master is not on the PATH)"
    try:
        import mooncake.store  # noqa: F401
    except ImportError as error:
        return f"mooncake cannot be loaded: {error}; Debian and Ubuntu have libibverbs1"
    return None


@contextmanager
def server(segment_bytes: int) -> Iterator[dict[str, Any]]:
    """A master and a holder of `segment_bytes`, as long as the block runs. Says where the master is."""
    port, metrics = free_port(), free_port()
    master = ["mooncake_master", f"--rpc_port={port}", "--rpc_address=127.0.0.1", "--metrics_host=127.0.0.1"]
    with working([*master, f"--metrics_port={metrics}"]):
        wait_for_port(port)
        holder = [sys.executable, "-m", "services.bench.stores.mooncake", f"127.0.0.1:{port}", str(segment_bytes)]
        with working(holder, environment=environment(MC_TCP_BIND_ADDRESS="127.0.0.1")) as process:
            if not process.stdout.readline():
                raise TransportError("Mooncake's holder did not start; its last words are on stderr")
            yield {"mooncake_master": f"127.0.0.1:{port}"}


def _connect(master: str, segment_bytes: int) -> Any:
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    if store.setup(f"127.0.0.1:{free_port()}", "P2PHANDSHAKE", segment_bytes, 64 << 20, "tcp", "", master):
        raise TransportError("Mooncake's setup failed; its last words are on stderr")
    return store


class Mooncake(Store):
    """Without copies of its own: `batch_put_from` and `batch_get_into` registered memory."""

    def __init__(self, values: Values, where: dict) -> None:
        super().__init__(values, where)
        self._store = _connect(where["mooncake_master"], 0)
        self._names = [key.hex() for key in values.keys]
        self._sizes = [values.size_bytes] * values.count
        self._source = np.concatenate([np.frombuffer(value, np.uint8) for value in values.data])
        self._from = self._register(self._source.ctypes.data)
        self._into = self._register(ctypes.addressof(ctypes.c_char.from_buffer(values.target)))

    def before_put(self) -> None:
        """A key that exists is not written again, and one that was read a moment ago cannot be removed."""
        for name in self._names:
            self._store.remove(name, force=True)

    def put(self) -> None:
        if any(self._store.batch_put_from(self._names, self._from, self._sizes)):
            raise TransportError("Mooncake did not take all values")

    def get(self) -> None:
        if self._store.batch_get_into(self._names, self._into, self._sizes) != self._sizes:
            raise TransportError("Mooncake did not return all values")

    def close(self) -> None:
        self._store.close()

    def _register(self, address: int) -> list[int]:
        if self._store.register_buffer(address, self.values.total_bytes):
            raise TransportError("Mooncake did not register memory")
        return [address + at * self.values.size_bytes for at in range(self.values.count)]


if __name__ == "__main__":
    held = _connect(sys.argv[1], int(sys.argv[2]))
    print("ready", flush=True)
    sys.stdin.read()
    held.close()
