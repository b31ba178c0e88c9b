"""Serve's gRPC servers on the addresses that were asked for.

Ray Serve 2.60 binds both the proxy's gRPC server (`ray.serve._private.grpc_util.start_grpc_server`) and each replica's own
(`Replica._on_initialized`) to every interface and has no setting for the host. On a machine of our own nothing may listen beyond
what the user named, so the two functions that bind are replaced, each in the process where it is called and before it is.
"""

from __future__ import annotations

import functools
from typing import Any

from grpc.aio import Server
from ray.serve._private import default_impl, replica
from ray.serve.config import gRPCOptions


class GrpcListen(gRPCOptions):
    """`gRPCOptions` with a `host`. It travels to the proxy's process by Ray's own serialization, just before the proxy binds."""

    host: str = "127.0.0.1"

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        default_impl.add_grpc_address = functools.partial(_bind, self.host)


def bind_replica(host: str) -> None:
    """Have the replica in this process bind its internal gRPC server to `host` only. Call it from the replica's constructor."""
    replica.add_port_to_grpc_server = functools.partial(_bind, host)


def _bind(host: str, server: Server, address: str) -> int:
    """Bind `server` to the port of `address` on `host`; gives the port."""
    port = address.rpartition(":")[2]
    return server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
