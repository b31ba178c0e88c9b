"""What the engine hands out: pages to write to, a block as a reader saw it, and counts of what has happened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from kvstore.arena.pages import Extent
from kvstore.block import BlockHeader
from kvstore.errors import InvalidInputError
from kvstore.eviction.base import Request
from kvstore.identity import DIGEST_BYTES

from .config import MAX_KEYS
from .table import Entry, pages_in


@dataclass(slots=True, eq=False)
class Reservation:
    """Pages for one block that is being written; invisible to readers."""

    id: bytes
    owner: str
    header: BlockHeader
    layers: list[tuple[Extent, ...]]
    request: Request
    parent: Entry | None

    @property
    def pages(self) -> int:
        return pages_in(self.layers)


class Found(NamedTuple):
    """A block as one reader saw it: valid while ``entry.generation == generation``."""

    entry: Entry
    generation: int
    header: BlockHeader
    layers: tuple[tuple[Extent, ...], ...]

    @classmethod
    def of(cls, entry: Entry, max_fidelity: int) -> Found:
        """`entry` as it is now, with no layer above `max_fidelity` (0 for all)."""
        header = entry.header
        if 0 < max_fidelity < header.present:
            header = header.truncate(max_fidelity)
        return cls(entry, entry.generation, header, tuple(entry.layers[: header.present]))


class Overflow(Protocol):
    """The tiers behind the arena, as the engine knows them."""

    def keep(self, entry: Entry) -> None:
        """`entry` is about to lose bytes to pressure; its pages are its own until this returns."""

    def forget(self, id: bytes) -> bool:
        """Nobody wants the block any more. Returns whether it was there."""


@dataclass(slots=True)
class Tally:
    """Events since the start, by label."""

    evictions: Counter[str] = field(default_factory=Counter)
    demotions: Counter[tuple[int, int]] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)


def check_keys(keys: Sequence[bytes]) -> None:
    """Raises InvalidInputError for more than `MAX_KEYS` keys, or one that is not 32 bytes."""
    if len(keys) > MAX_KEYS:
        raise InvalidInputError(f"{len(keys)} keys in one call, at most {MAX_KEYS}; split the call")
    if any(len(key) != DIGEST_BYTES for key in keys):
        raise InvalidInputError(f"a block key has {DIGEST_BYTES} bytes; digests are never cut short")
