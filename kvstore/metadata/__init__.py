"""Cluster metadata: block index and membership. `connect` chooses the backend by the URL's scheme."""

from __future__ import annotations

from importlib import import_module

from kvstore.errors import ConfigError

from .base import IndexEntry, Location, Metadata, NodeRecord, WorkerRecord
from .inproc import InprocMetadata, InprocState

#: URL scheme -> "module:Class"; the class is called with (url, prefix, timeout_s).
BACKENDS = {
    "redis": "kvstore.metadata.redis:RedisMetadata",
    "rediss": "kvstore.metadata.redis:RedisMetadata",
    "unix": "kvstore.metadata.redis:RedisMetadata",
}

__all__ = [
    "BACKENDS",
    "IndexEntry",
    "InprocMetadata",
    "InprocState",
    "Location",
    "Metadata",
    "NodeRecord",
    "WorkerRecord",
    "connect",
]


def connect(url: str, prefix: str = "concertina", timeout_s: float = 0.8) -> Metadata:
    """The metadata at `url`, such as ``redis://:password@127.0.0.1:6379/0``. Connects on first use.

    Parameters
    ----------
    prefix : str
        Start of every key; systems with different prefixes share a server without seeing each other.
    timeout_s : float
        Deadline of each call.

    Raises
    ------
    ConfigError
        For a scheme that no backend serves.
    """
    scheme = url.partition("://")[0]
    if scheme not in BACKENDS:
        raise ConfigError(f"{url!r} is no metadata URL; it must begin with one of {', '.join(s + '://' for s in BACKENDS)}")
    module, _, name = BACKENDS[scheme].partition(":")
    return getattr(import_module(module), name)(url, prefix, timeout_s)
