"""Settings of one store node."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvstore.errors import ConfigError
from kvstore.eviction import DEFAULT

#: Most keys that one call may name.
MAX_KEYS = 65_536
#: Longest lease that a reader may ask for.
MAX_LEASE_S = 60.0
#: Longest pin.
MAX_PIN_S = 86_400
#: Payload bytes of one frame of a Get stream; also the most that a copy may take at once on the event loop.
FRAME_BYTES = 2 << 20
#: Payload bytes that one frame of a Put stream may hold.
MAX_FRAME_BYTES = 4 << 20
#: Hosts that only this machine reaches.
LOOPBACK = ("127.", "localhost", "[::1]", "unix:")


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """Everything a node can be told. Checked when it is made.

    Parameters
    ----------
    redis : str
        Where the cluster's metadata is; empty for a node by itself.
    prefix : str
        Start of the names in Redis: which system this node is part of, where several share a server.
    listen : str
        ``host:port`` of the gRPC service; port 0 takes a free one.
    advertise : str
        Host under which others reach this node; empty derives it from `listen`.
    metrics : str
        ``host:port`` of the metrics page; empty for none.
    arena : int
        Bytes of the arena.
    device : str
        ``cpu``, ``cuda`` or ``cuda:N``.
    policy : str
        Name of the eviction policy.
    id : str
        Name of the node; empty draws one.
    page_bytes : int
        Bytes of a page, a power of two from 512 to 1 MiB.
    heartbeat_s : float
        Seconds between two heartbeats.
    max_leases : int
        Leases held at one time.
    lease_share, pin_share : float
        Largest part of the arena under lease, and pinned.
    get_hold_s : float
        A Get holds its blocks for so long; a reader slower than that may lose some, never gets wrong ones.
    put_timeout_s, get_timeout_s : float
        Longest that one Put or Get stream may last.
    drain_s : float
        At the end, seconds that running calls have to finish.
    max_streams : int
        Calls served at one time.
    spill, spill_bytes : str, int
        A directory for what the arena has no room for, and the bytes that it may hold; empty and 0 for none.
    spill_host_bytes : int
        Bytes of host memory for the same, in front of the directory: for an arena on a GPU. 0 for none.
    spill_queue_bytes : int
        Bytes that may wait to be spilled; what comes on top is evicted for good.
    credentials : str
        File of `kvstore.credentials`; calls then need a token or a client certificate that it names. Empty asks for none.
    tls_cert, tls_key : str
        PEM files of the server's certificate chain and key; empty serves in plain text.
    tls_client_ca : str
        PEM file; clients must then show a certificate that it vouches for (mutual TLS).
    """

    redis: str = ""
    prefix: str = "concertina"
    listen: str = "127.0.0.1:0"
    advertise: str = ""
    metrics: str = ""
    arena: int = 256 << 20
    device: str = "cpu"
    policy: str = DEFAULT
    id: str = ""
    page_bytes: int = 4096
    heartbeat_s: float = 0.5
    max_leases: int = 4096
    lease_share: float = 0.25
    pin_share: float = 0.5
    get_hold_s: float = 10.0
    put_timeout_s: float = 60.0
    get_timeout_s: float = 60.0
    drain_s: float = 5.0
    max_streams: int = 1024
    spill: str = ""
    spill_bytes: int = 0
    spill_host_bytes: int = 0
    spill_queue_bytes: int = 64 << 20
    credentials: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""

    def __post_init__(self) -> None:
        for name in ("listen", "metrics"):
            value = getattr(self, name)
            if (value or name == "listen") and not _is_address(value):
                raise ConfigError(f"--{name} {value!r} is no HOST:PORT; write it as 127.0.0.1:7000, port 0 takes a free one")
        if self.page_bytes & (self.page_bytes - 1) or not 512 <= self.page_bytes <= 1 << 20:
            raise ConfigError(f"--page-bytes {self.page_bytes} must be a power of two from 512 to 1048576")
        if self.arena < self.page_bytes:
            raise ConfigError(f"--arena of {self.arena} bytes holds no page of {self.page_bytes}; give a size such as 256MiB")
        if self.id and not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", self.id):
            raise ConfigError(f"--id {self.id!r} may have up to 64 letters, digits, dots, dashes and underscores")
        for name in ("lease_share", "pin_share"):
            if not 0 < getattr(self, name) <= 0.5:
                raise ConfigError(f"{name} must be above 0 and at most 0.5, not {getattr(self, name)}")
        for name in ("heartbeat_s", "get_hold_s", "put_timeout_s", "get_timeout_s", "drain_s", "max_leases", "max_streams"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        if bool(self.spill) != (self.spill_bytes > 0):
            raise ConfigError("--spill DIR and --spill-bytes SIZE belong together; give both or neither")
        if bool(self.tls_cert) != bool(self.tls_key) or (self.tls_client_ca and not self.tls_cert):
            raise ConfigError("--tls-cert and --tls-key belong together, and --tls-client-ca needs both")

    @property
    def exposed(self) -> bool:
        """Whether other machines can reach the service in plain text."""
        return not self.tls_cert and not self.listen.startswith(LOOPBACK)


def _is_address(text: str) -> bool:
    host, colon, port = text.rpartition(":")
    return bool(host and colon) and port.isdecimal() and int(port) < 65_536
