"""A real Redis Cluster of three primaries on this machine."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import redis

from kvstore.metadata.embedded import EmbeddedValkey, start_valkey

#: Slots of each member, but for the last, which has two fewer.
SHARE = 5462


@contextmanager
def redis_cluster(directory: Path) -> Iterator[list[EmbeddedValkey]]:
    """Three servers, one third of the slots each, ended at the end."""
    with ExitStack() as stack:
        servers = []
        for i in range(3):
            settings = {"cluster-enabled": "yes", "cluster-node-timeout": "2000", "cluster-port": str(_free_port())}
            servers.append(start_valkey(directory / f"member-{i}", settings=settings))
            stack.callback(servers[-1].stop)
        members = [stack.enter_context(redis.Redis(port=s.port)) for s in servers]
        for i, member in enumerate(members):
            member.execute_command("CLUSTER", "ADDSLOTSRANGE", i * SHARE, min(16383, (i + 1) * SHARE - 1))
            member.execute_command("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
            bus_port = members[0].config_get("cluster-port")["cluster-port"]
            member.execute_command("CLUSTER", "MEET", "127.0.0.1", servers[0].port, bus_port)
        _wait_until_whole(members)
        yield servers


def _wait_until_whole(members: list[redis.Redis], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while any(b"cluster_state:ok" not in m.execute_command("CLUSTER", "INFO") for m in members):
        assert time.monotonic() < deadline, "the cluster did not form"
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
