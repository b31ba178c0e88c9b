"""Blocks whose bytes can be told from their key alone, so that any reader can judge what it got."""

from __future__ import annotations

import random

import numpy as np

from kvstore.block import BlockHeader, Distortion, EncodedBlock, LayerInfo
from kvstore.identity import NO_PARENT, block_keys, digest

NAMESPACE = digest(b"fault tests")
TOKENS = 4


def chain(name: int, count: int, size: int = 60_000) -> list[EncodedBlock]:
    """`count` blocks of three layers, `size` bytes each; the same for the same `name`."""
    first = name * 1000
    keys = block_keys(NAMESPACE, np.arange(first, first + count * TOKENS), TOKENS)
    rows = tuple(LayerInfo(0, 0, Distortion(0.1 / 2**i, 0.1 / 2**i)) for i in range(3))
    blocks = []
    for at, key in enumerate(keys):
        noise = random.Random(key).randbytes(size)
        header = BlockHeader(1, 2, 30, 3, 64, at * TOKENS, TOKENS, rows, 3)
        block = EncodedBlock.build(header, (noise[: size // 2], noise[size // 2 : 3 * size // 4], noise[3 * size // 4 :]))
        blocks.append(block.with_identity(key, NAMESPACE, keys[at - 1] if at else NO_PARENT))
    return blocks


def is_one_of(block: EncodedBlock, known: dict[bytes, EncodedBlock]) -> bool:
    """Whether `block` is a known one, whole or cut at a layer."""
    whole, present = known.get(block.header.key), block.header.present
    return whole is not None and present in whole.fidelities and block.to_bytes() == whole.truncate(present).to_bytes()
