"""Eviction policies: one small protocol (`base`), one file a policy, one table. The same objects run in nodes and in the replay."""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any

from ..errors import ConfigError
from .base import BlockInfo, EvictionPolicy, Request, Victim

__all__ = ["DEFAULT", "POLICIES", "BlockInfo", "EvictionPolicy", "Request", "Victim", "create", "create_online", "names", "policy_class"]

#: Name -> class, imported on use.
POLICIES: dict[str, str] = {
    "lru": "kvstore.eviction.lru:LruPolicy",
    "fifo": "kvstore.eviction.fifo:FifoPolicy",
    "s3fifo": "kvstore.eviction.s3fifo:S3FifoPolicy",
    "gdsf": "kvstore.eviction.gdsf:GdsfPolicy",
    "value": "kvstore.eviction.value:ValuePolicy",
    "opt": "kvstore.eviction.opt:OptPolicy",
}

#: The policy that runs where none is named.
DEFAULT = "value"


def names() -> tuple[str, ...]:
    """Names of all policies."""
    return tuple(POLICIES)


def policy_class(name: str) -> type[EvictionPolicy]:
    """The class of the policy `name`.

    Raises
    ------
    ConfigError
        For a name that is not in the table.
    """
    if name not in POLICIES:
        raise ConfigError(f"no eviction policy {name!r}; known: {', '.join(POLICIES)}")
    module, _, attribute = POLICIES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def create(name: str = DEFAULT, **options: Any) -> EvictionPolicy:
    """A new policy `name`, built as ``cls(cls.Config(**options))``.

    Raises
    ------
    ConfigError
        For an unknown policy or an option that it does not have.
    """
    cls = policy_class(name)
    known = {f.name for f in fields(cls.Config)}
    if unknown := set(options) - known:
        raise ConfigError(
            f"policy {name} has no setting {', '.join(sorted(unknown))}; known: {', '.join(sorted(known)) or 'none'}"
        )
    return cls(cls.Config(**options))


def create_online(name: str = DEFAULT, **options: Any) -> EvictionPolicy:
    """A new policy for a store that really runs.

    Raises
    ------
    ConfigError
        Like `create`, and for a policy that sees the future.
    """
    if policy_class(name).sees_future:
        raise ConfigError(f"policy {name} sees the future, which only a replay of one store knows; choose another, such as {DEFAULT}")
    return create(name, **options)
