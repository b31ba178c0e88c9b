"""Tiers behind the arena: host memory behind a GPU's, a disk behind either. What the arena loses to pressure can still be read.

A spilled block is inclusive: it stays in its tier when it is read back into the arena, so that losing it from there again costs no
write. Nothing that comes out of a tier is trusted: a block certifies itself, every time.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .base import SpillTier
from .level import Level
from .spill import Spill

if TYPE_CHECKING:
    from kvstore.clock import Clock

    from ..config import NodeConfig

#: Name of a tier -> "module:Class".
TIERS = {"memory": "kvstore.node.spill.memory:MemoryTier", "disk": "kvstore.node.spill.disk:DiskTier"}

__all__ = ["TIERS", "Level", "Spill", "SpillTier", "create", "spill_levels"]


def spill_levels(config: NodeConfig, clock: Clock, changed: Callable[[bytes], None]) -> list[Level]:
    """The levels that a node's settings ask for, the fastest first. Raises ConfigError where a place cannot be used."""
    levels = []
    if config.spill_host_bytes:
        levels.append(Level(create("memory"), config.spill_host_bytes, config.spill_queue_bytes, clock, changed))
    if config.spill:
        disk = create("disk", directory=config.spill, capacity_bytes=config.spill_bytes)
        levels.append(Level(disk, config.spill_bytes, config.spill_queue_bytes, clock, changed))
    return levels


def create(name: str, **settings: Any) -> SpillTier:
    """The tier `name`. Raises ConfigError where its place cannot be used."""
    module, _, cls = TIERS[name].partition(":")
    return getattr(import_module(module), cls)(**settings)
