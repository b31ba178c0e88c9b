"""Settings of the store's client."""

from __future__ import annotations

from dataclasses import dataclass, fields

from kvstore.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """Every bound and deadline of a `KvClient`; times in seconds, sizes in bytes.

    Parameters
    ----------
    redis_url, prefix : str
        The cluster's metadata.
    redis_timeout_s : float
        Deadline of one round trip to it; what a dead Redis costs one request, once.
    refresh_s : float
        Time between two reads of the membership; the same read finds out that Redis is back.
    suspect_s : float
        How long a node that failed a call is left alone.
    tidy_after_s : float
        Index entries of an incarnation that was not alive for so long are removed.
    streams_per_node : int
        Parallel Get streams to one node within a fetch.
    max_block_bytes : int
        A header that claims more is refused before anything is allocated.
    offload_bytes : int
        Payloads that come by gRPC in several frames are put together and verified in a thread from this size on: it takes 0.3 ms a MiB,
        the way to a thread and back 0.1 ms.
    queue_blocks, queue_bytes : int
        Bounds of what waits to be published; more is dropped and counted.
    batch_blocks, batch_bytes : int
        Published in one round: one lookup, one Put stream to each node.
    copy_bytes_per_s : int
        Bound of the second copies that are made of what a busy node's readers wait for.
    put_timeout_s, rpc_timeout_s : float
        Deadlines of one Put stream, and of each administrative call.
    credential : str
        File with the token to show to nodes; empty for none.
    tls_ca : str
        PEM file of the authorities that vouch for nodes, or ``system``; empty for plain text.
    tls_cert, tls_key : str
        PEM files of the client's own certificate and key, where nodes ask for one.
    tls_name : str
        Name in the nodes' certificates, where it is not the host in their addresses.
    paths : str
        The ways beside gRPC by which blocks may travel, apart by commas: ``local`` (shared memory of a node on this host), ``tcp``.
    fetch_bytes : int
        Of the blocks of one fetch; what is beyond is a miss.
    buffer_bytes : int
        Unused buffers kept for the next fetch, until nothing has been fetched for a while.
    """

    redis_url: str = "redis://127.0.0.1:6379/0"
    prefix: str = "concertina"
    redis_timeout_s: float = 0.5
    refresh_s: float = 0.5
    suspect_s: float = 1.0
    tidy_after_s: float = 10.0
    streams_per_node: int = 2
    max_block_bytes: int = 256 << 20
    offload_bytes: int = 3 << 20
    queue_blocks: int = 4096
    queue_bytes: int = 512 << 20
    batch_blocks: int = 64
    batch_bytes: int = 64 << 20
    copy_bytes_per_s: int = 32 << 20
    put_timeout_s: float = 5.0
    rpc_timeout_s: float = 5.0
    credential: str = ""
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_name: str = ""
    paths: str = "local,tcp"
    fetch_bytes: int = 4 << 30
    buffer_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) and not value > 0:
                raise ConfigError(f"client setting {field.name} must be above 0, not {value!r}")
        if bool(self.tls_cert) != bool(self.tls_key) or (self.tls_cert and not self.tls_ca):
            raise ConfigError("client settings tls_cert and tls_key belong together, and need tls_ca (a PEM file, or system)")
        if unknown := set(filter(None, self.paths.split(","))) - {"local", "tcp"}:
            raise ConfigError(f"client setting paths knows local and tcp, not {', '.join(sorted(unknown))}")
