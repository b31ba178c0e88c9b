"""The contract of one tier: blobs under ids, kept somewhere. Every method may block and is called from a thread, but for `close`.

A tier decides nothing: what it holds, how much, and what goes first is its `Level`'s business, on the event loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

Buffer = bytes | bytearray | memoryview


class Survivor(NamedTuple):
    """A blob that an earlier process left: its id, its size, and its first bytes: the record's head, or nothing where it cannot be read."""

    id: bytes
    size_bytes: int
    head: Buffer


class SpillTier(ABC):
    """One place for blobs. `store` and `drop` are called one at a time and in order; `load` may run beside them."""

    name: ClassVar[str]

    def cost(self, size_bytes: int) -> int:
        """Bytes of the capacity that a blob of `size_bytes` takes."""
        return size_bytes

    @abstractmethod
    def store(self, id: bytes, pieces: Sequence[Buffer]) -> None:
        """Keep the joined `pieces` under `id`, in place of what was there; whole or not at all.

        Raises
        ------
        CapacityError
            When the place is full.
        TransportError
            When it cannot be written for another reason.
        """

    @abstractmethod
    def load(self, id: bytes, size_bytes: int) -> Buffer:
        """The blob of `id`.

        Raises
        ------
        NotFoundError
            When it is not there.
        CorruptBlockError
            When it is not `size_bytes` long; no more than that is ever read.
        TransportError
            When it cannot be read.
        """

    @abstractmethod
    def drop(self, id: bytes) -> None:
        """Forget a blob, if there is one. Raises TransportError when that fails."""

    def survivors(self) -> Iterator[Survivor]:
        """What an earlier process left, the longest kept first; what is none of ours is left alone. Raises TransportError."""
        return iter(())

    def close(self) -> None:
        """Give the place back. Safe to call twice."""
