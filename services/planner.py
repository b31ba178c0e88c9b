"""How much memory a KV cache needs under each codec.

Formats of fixed size grow by the same bytes with every layer of the model, so blocks of noise of one and of two layers tell; codecs that
are asked for a ratio are taken at their word, which `concertina evaluate` checks.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from kvstore.codecs import codec_class, create, names
from kvstore.layout import KVLayout

BLOCK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Need:
    """What one codec makes of a cache.

    Parameters
    ----------
    codec : str
    ratio : float
        Bytes of K and V at 2 a value over stored bytes.
    stored_bytes : int
        Of all tokens that were asked about.
    nodes_needed : int or None
        Whose arenas hold them; None where an arena holds not even one block.
    tokens_that_fit : int
        Into the nodes that there are, in whole blocks.
    """

    codec: str
    ratio: float
    stored_bytes: int
    nodes_needed: int | None
    tokens_that_fit: int


def needs(layout: KVLayout, tokens: int, arena_bytes: int, nodes: int, ratio: float | None = None) -> list[Need]:
    """One entry a codec, in the table's order.

    Parameters
    ----------
    layout : KVLayout
    tokens : int
        Of all sequences together.
    arena_bytes : int
        Of one node.
    nodes : int
        That there are.
    ratio : float, optional
        For the codecs that can be asked for one.
    """
    found = []
    for name in names():
        block_bytes = _block_bytes(name, layout, ratio)
        blocks, per_node = -(-tokens // BLOCK_TOKENS), arena_bytes // block_bytes
        found.append(
            Need(
                codec=name,
                ratio=layout.raw_bytes(BLOCK_TOKENS) / block_bytes,
                stored_bytes=blocks * block_bytes,
                nodes_needed=-(-blocks // per_node) if per_node else None,
                tokens_that_fit=per_node * nodes * BLOCK_TOKENS,
            )
        )
    return found


def _block_bytes(name: str, layout: KVLayout, ratio: float | None) -> int:
    """Bytes of one whole block."""
    options = {field.name: field.default for field in dataclasses.fields(codec_class(name).Config)}
    if "ratio" in options:
        return math.ceil(layout.raw_bytes(BLOCK_TOKENS) / (ratio or options["ratio"]))
    one, two = (_encoded_bytes(name, KVLayout(layers, layout.kv_heads, layout.head_dim)) for layers in (1, 2))
    return one + (layout.layers - 1) * (two - one)


def _encoded_bytes(name: str, layout: KVLayout) -> int:
    shape = (layout.layers, layout.kv_heads, BLOCK_TOKENS, layout.head_dim)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(layout.dtype)
    return len(create(name, layout).encode(noise, noise, start=BLOCK_TOKENS).to_bytes())
