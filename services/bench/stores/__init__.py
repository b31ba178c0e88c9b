"""Stores side by side, each behind the same few calls and in processes of its own: `STORES` names them.

`client.py` is the process that holds the values and moves them; `base.py` what it asks of a store.
"""

from __future__ import annotations

from importlib import import_module

from .base import Store

#: Name in results -> "module:Class".
STORES: dict[str, str] = {
    "memory": "services.bench.stores.memory:Memory",
    "pinned": "services.bench.stores.pinned:Pinned",
    "plain_tcp": "services.bench.stores.plain_tcp:PlainTcp",
    "redis": "services.bench.stores.redis:Redis",
    "grpc": "services.bench.stores.concertina:ByGrpc",
    "tcp": "services.bench.stores.concertina:ByTcp",
    "same_host": "services.bench.stores.concertina:OnSameHost",
    "lmcache": "services.bench.stores.lmcache:LmCache",
    "mooncake": "services.bench.stores.mooncake:Mooncake",
}


def store_class(name: str) -> type[Store]:
    """The class of store `name`."""
    module, _, cls = STORES[name].partition(":")
    return getattr(import_module(module), cls)
