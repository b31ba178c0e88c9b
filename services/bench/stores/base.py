"""What a benchmark asks of a store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from kvstore.block import BlockHeader, Distortion, EncodedBlock, LayerInfo
from kvstore.identity import NO_PARENT, block_keys, digest

NAMESPACE = digest(b"bench store")


@dataclass
class Values:
    """What one client moves: `count` random values of `size_bytes`, and memory of the same size for what it reads.

    Parameters
    ----------
    client : int
        Number of the client; no two have the same values or keys.
    """

    count: int
    size_bytes: int
    client: int = 0
    data: list[memoryview] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.client)
        self.data = [memoryview(rng.integers(0, 256, self.size_bytes, np.uint8)).toreadonly() for _ in range(self.count)]

    @cached_property
    def target(self) -> memoryview:
        """Memory for all values, touched once so that no page is missing."""
        return memoryview(np.ones(self.total_bytes, np.uint8))

    @property
    def total_bytes(self) -> int:
        return self.count * self.size_bytes

    @cached_property
    def keys(self) -> list[bytes]:
        """One key a value: a chain of one-token blocks."""
        return block_keys(digest(NAMESPACE, str(self.client).encode()), np.arange(self.count), 1)

    @cached_property
    def blocks(self) -> list[EncodedBlock]:
        """The values as blocks of a chain."""
        row = LayerInfo(0, 0, Distortion(0.0, 0.0))
        parents = [NO_PARENT, *self.keys]
        return [
            EncodedBlock.build(BlockHeader(1, 0, 1, 1, 1, at, 1, (row,), 1), (value,)).with_identity(key, NAMESPACE, parents[at])
            for at, (key, value) in enumerate(zip(self.keys, self.data, strict=True))
        ]

    def place(self, at: int) -> memoryview:
        """Where value `at` goes when it is read."""
        return self.target[at * self.size_bytes : (at + 1) * self.size_bytes]


class Store(ABC):
    """One store as one client sees it. Only `put` and `get` are timed.

    Parameters
    ----------
    values : Values
    where : dict
        What the benchmark started for all stores, such as ports.
    """

    def __init__(self, values: Values, where: dict) -> None:
        self.values = values
        self.where = where

    def before_put(self) -> None:
        """Make it so that the next put moves every byte."""

    @abstractmethod
    def put(self) -> None:
        """Store all values in one call."""

    def before_get(self) -> None:
        """Wait until what was put can be read."""

    @abstractmethod
    def get(self) -> object:
        """Read all values in one call. What it returns is let go after the clock has stopped."""

    def close(self) -> None:
        """Disconnect."""
