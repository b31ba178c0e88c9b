"""Engines: what runs the model inside a worker. `ENGINES` is the table; adding one is a file and a row."""

from __future__ import annotations

import importlib

from kvstore.errors import ConfigError

from .base import Engine

#: Name -> "module:Class", imported on use.
ENGINES: dict[str, str] = {
    "transformers": "services.engine.transformers_engine:TransformersEngine",
}


def engine_class(name: str) -> type[Engine]:
    """The class behind `name`. Raises ConfigError, naming the known ones, for any other."""
    if name not in ENGINES:
        raise ConfigError(f"unknown engine {name!r}; known: {', '.join(ENGINES)}")
    module, _, attribute = ENGINES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
