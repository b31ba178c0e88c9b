"""The processes of one comparison of stores: servers, and clients that move values when told."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from kvstore.errors import TransportError

_READY_S, _STOP_S = 60.0, 10.0
#: What a node's arena has on top of the blocks: headers are elsewhere, but no node likes to be full.
ROOM = 1.25


class Party:
    """Clients of several stores, which take turns. Made by `party`.

    Parameters
    ----------
    clients : list of Popen
        Processes of `stores.client`.
    bytes_each : int
        What one client moves in one call.
    """

    def __init__(self, clients: list[subprocess.Popen], bytes_each: int) -> None:
        self._clients = clients
        self.total_bytes = bytes_each * len(clients)

    def move(self, operation: str, store: str) -> float:
        """All clients ``put`` or ``get`` all their values at once. Returns seconds from the first begin to the last end."""
        for client in self._clients:
            client.stdin.write(f"{operation} {store}\n")
            client.stdin.flush()
        spans = [_answer(client) for client in self._clients]
        return max(ended for _, ended in spans) - min(began for began, _ in spans)


@contextmanager
def party(stores: Sequence[str], where: dict[str, Any], *, clients: int, count: int, size_bytes: int) -> Iterator[Party]:
    """Start a node and a plain TCP server for `clients` times `count` values, and the clients; end them afterwards.

    Parameters
    ----------
    where : dict
        With ``redis``, the URL of a server that is there for this, and ``device``, where the node's arena is.
    """
    each = count * size_bytes
    with ExitStack() as stack:
        arena_bytes = int(ROOM * each * clients) + (64 << 20)
        ports = stack.enter_context(servers(where, arena_bytes=arena_bytes, copy_bytes=each))
        setup = {"count": count, "size_bytes": size_bytes, "stores": list(stores), "where": {**where, **ports}}
        client = [sys.executable, "-m", "services.bench.stores.client"]
        workers = [_start(stack, [*client, json.dumps(setup | {"client": number})]) for number in range(clients)]
        for worker in workers:
            _answer(worker)
        yield Party(workers, each)


@contextmanager
def servers(where: dict[str, Any], *, arena_bytes: int, copy_bytes: int) -> Iterator[dict[str, Any]]:
    """A node and a plain TCP server, in processes of their own, as long as the block runs. Says where they are."""
    with ExitStack() as stack:
        command = [sys.executable, "-m", "services.cli", "node", "--redis", where["redis"], "--device", where["device"]]
        node = _start(stack, [*command, "--arena", str(arena_bytes)])
        plain = _start(stack, [sys.executable, "-m", "services.bench.stores.plain_tcp", str(copy_bytes)])
        yield {"node": json.loads(_first_line(node))["address"], "plain_tcp_port": int(_first_line(plain))}


@contextmanager
def working(command: Sequence[str], environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen]:
    """A server that is ended after the block."""
    with ExitStack() as stack:
        yield _start(stack, command, environment)


def free_port() -> int:
    """A TCP port of this host that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port: int) -> None:
    """Until somebody listens there. Raises TransportError after a minute."""
    until = time.monotonic() + _READY_S
    while time.monotonic() < until:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise TransportError(f"nothing listens on port {port} after {_READY_S:.0f} s")


def _start(stack: ExitStack, command: Sequence[str], environment: dict[str, str] | None = None) -> subprocess.Popen:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    stack.callback(_stop, process)
    return process


def _stop(process: subprocess.Popen) -> None:
    """A client ends with its stdin; a server is told to."""
    process.stdin.close()
    if "services.bench.stores.client" not in process.args:
        process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def _first_line(process: subprocess.Popen) -> str:
    line = process.stdout.readline()
    if not line:
        raise TransportError(f"{' '.join(process.args[1:4])} ended with status {process.wait()}; its last words are on stderr")
    return line


def _answer(process: subprocess.Popen) -> Any:
    return json.loads(_first_line(process))
