"""Codecs that are quick from their first block on."""

from __future__ import annotations

from typing import Any

import torch

from kvstore.codecs import Codec, Profile, create
from kvstore.layout import KVLayout

from .config import EngineConfig


def ready_codec(name: str, layout: KVLayout, profile: Profile | None, options: dict[str, Any], config: EngineConfig) -> Codec:
    """A codec that has encoded and decoded a block: kernels are compiled and the profile's matrices folded, which takes seconds.

    Raises
    ------
    ConcertinaError
        For options that are none, or a profile that does not fit.
    """
    codec = create(name, layout, profile, **options)
    generator = torch.Generator().manual_seed(0)
    shape = (layout.layers, layout.kv_heads, config.block_tokens, layout.head_dim)
    keys, values = (torch.randn(shape, generator=generator).to(config.device, layout.dtype) for _ in range(2))
    tokens = [0] * config.block_tokens
    for start in (0, config.block_tokens):
        codec.decode(codec.encode(keys, values, start=start, tokens=tokens), tokens=tokens, device=config.device)
    return codec
