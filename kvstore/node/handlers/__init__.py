"""One file an RPC. `HANDLERS` names the class that answers it; a contract test compares the keys with the service's descriptor."""

from __future__ import annotations

from importlib import import_module

from .base import Handler

#: RPC of `KVStoreService` -> "module:Class".
HANDLERS: dict[str, str] = {
    "Lookup": "kvstore.node.handlers.lookup:Lookup",
    "Get": "kvstore.node.handlers.get:Get",
    "Put": "kvstore.node.handlers.put:Put",
    "Release": "kvstore.node.handlers.release:Release",
    "Pin": "kvstore.node.handlers.pin:Pin",
    "Unpin": "kvstore.node.handlers.unpin:Unpin",
    "Evict": "kvstore.node.handlers.evict:Evict",
    "Clear": "kvstore.node.handlers.clear:Clear",
    "List": "kvstore.node.handlers.list:List",
    "Stats": "kvstore.node.handlers.stats:Stats",
}

__all__ = ["HANDLERS", "Handler", "handler_class"]


def handler_class(rpc: str) -> type[Handler]:
    """The class that answers `rpc`."""
    module, _, name = HANDLERS[rpc].partition(":")
    return getattr(import_module(module), name)
