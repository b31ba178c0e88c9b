"""Presses: token-level eviction on one request's live cache. `PRESSES` is the table; adding one is a file and a row."""

from __future__ import annotations

import importlib

from kvstore.errors import InvalidInputError

from .base import Press

#: Name -> "module:Class", imported on use.
PRESSES: dict[str, str] = {
    "sliding_window": "services.engine.presses.sliding_window:SlidingWindow",
    "h2o": "services.engine.presses.h2o:H2o",
    "snapkv": "services.engine.presses.snapkv:SnapKv",
    "tova": "services.engine.presses.tova:Tova",
    "knorm": "services.engine.presses.knorm:KNorm",
}


def create_press(name: str, budget: int) -> Press | None:
    """The press `name` with a budget in tokens; None for the empty name.

    Raises
    ------
    InvalidInputError
        For an unknown name, or a budget below what the press can work with.
    """
    if not name:
        return None
    if name not in PRESSES:
        raise InvalidInputError(f"unknown press {name!r}; known: {', '.join(PRESSES)}")
    module, _, attribute = PRESSES[name].partition(":")
    cls: type[Press] = getattr(importlib.import_module(module), attribute)
    if budget < cls.min_budget:
        raise InvalidInputError(f"press {name!r} needs a budget of at least {cls.min_budget} tokens, not {budget}")
    return cls(budget)
