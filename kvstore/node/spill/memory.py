"""Host memory as a tier, behind an arena that is a GPU's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from kvstore.errors import CorruptBlockError, NotFoundError

from .base import Buffer, SpillTier


class MemoryTier(SpillTier):
    """Blobs in a dict; gone with the process."""

    name: ClassVar[str] = "memory"

    def __init__(self) -> None:
        self._blobs: dict[bytes, bytes] = {}

    def store(self, id: bytes, pieces: Sequence[Buffer]) -> None:
        self._blobs[id] = b"".join(pieces)

    def load(self, id: bytes, size_bytes: int) -> Buffer:
        blob = self._blobs.get(id)
        if blob is None:
            raise NotFoundError("the block is not in host memory any more")
        if len(blob) != size_bytes:
            raise CorruptBlockError(f"a spilled block has {len(blob)} bytes, not {size_bytes}")
        return blob

    def drop(self, id: bytes) -> None:
        self._blobs.pop(id, None)

    def close(self) -> None:
        self._blobs.clear()
