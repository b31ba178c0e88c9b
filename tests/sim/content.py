"""The chains that simulated clients write and read: a few prompts, each encoded in several ways. Made once, the same for all seeds."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import numpy as np

from kvstore.block import BlockHeader, Distortion, EncodedBlock, LayerInfo, Provenance
from kvstore.identity import NO_PARENT, block_keys, digest

BLOCKS, TOKENS, LAYERS = 6, 4, 6
#: What each encoding of a prompt is like: bytes of each layer, error at the base (halved by each further layer), exactness of its prefix.
ENCODINGS = (
    ((900,), 0.0, Provenance()),
    ((700, 400, 600), 0.4, Provenance()),
    ((1300, 500), 0.2, Provenance(1, Distortion(0.5, 0.5))),
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One chain: its namespace, its keys, root first, and its blocks in each encoding."""

    namespace: bytes
    keys: list[bytes]
    encodings: list[list[EncodedBlock]]


@cache
def prompts() -> tuple[Prompt, ...]:
    """Three prompts in each of two namespaces; those of different namespaces have the same tokens."""
    return tuple(_prompt(digest(b"tenant", bytes([tenant])), first) for tenant in range(2) for first in range(3))


def _prompt(namespace: bytes, first: int) -> Prompt:
    keys = block_keys(namespace, np.arange(first * 100, first * 100 + BLOCKS * TOKENS), TOKENS)
    return Prompt(namespace, keys, [[_block(namespace, keys, at, number) for at in range(BLOCKS)] for number in range(len(ENCODINGS))])


def _block(namespace: bytes, keys: list[bytes], at: int, number: int) -> EncodedBlock:
    sizes, error, provenance = ENCODINGS[number]
    rng = random.Random(keys[at] + bytes([number]))
    rows = tuple(LayerInfo(0, 0, Distortion(error / 2**i, error / 2**i)) for i in range(len(sizes)))
    header = BlockHeader(number + 1, 2, LAYERS, 1, 8, at * TOKENS, TOKENS, rows, len(sizes))
    block = EncodedBlock.build(header, [rng.randbytes(size + 60 * at) for size in sizes], sectioned=True)
    return block.with_identity(keys[at], namespace, keys[at - 1] if at else NO_PARENT, provenance)
