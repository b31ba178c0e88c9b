"""The store node: one process, one arena. Names are resolved on use, so that reading a `NodeConfig` loads no gRPC."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .config import NodeConfig

__all__ = ["NodeConfig", "StoreNode", "run"]

_LAZY = {"StoreNode": "kvstore.node.node", "run": "kvstore.node.node"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
