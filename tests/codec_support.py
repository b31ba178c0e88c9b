"""Layouts, data and codecs that the codec tests share; every codec of the table is built here, `transform` from a tiny profile."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch

from kvstore.codecs import Codec, KVSample, calibrate, codec_class, create
from kvstore.layout import KVLayout, RopeSpec
from kvstore.rope import LayeredRope, rope_from_config

VOCABULARY = 40


def rope(dim: int, scale: float = 1.0, interleaved: bool = False) -> RopeSpec:
    return RopeSpec(tuple(10_000.0 ** (-2 * i / dim) for i in range(dim // 2)), scale, interleaved)


#: What Llama 3.1's scaling makes of the slow pairs.
LLAMA3 = rope_from_config(
    SimpleNamespace(
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    64, 2,
)  # fmt: skip
LAYOUTS = {
    "mha": KVLayout(3, 4, 32, torch.bfloat16, rope(32)),
    "gqa fp16": KVLayout(4, 2, 64, torch.float16, rope(64)),
    "mqa fp32": KVLayout(2, 1, 128, torch.float32, rope(128)),
    "partial rope": KVLayout(2, 3, 32, torch.float32, rope(16)),
    "no rope, odd head": KVLayout(2, 2, 80, torch.bfloat16),
    "yarn, interleaved": KVLayout(2, 2, 64, torch.float16, rope(64, 1.2, True)),
    "wide head": KVLayout(2, 1, 256, torch.bfloat16, rope(256)),
    "one layer": KVLayout(1, 1, 32, torch.float32, rope(32)),
    "llama 3 rope": KVLayout(2, 2, 64, torch.bfloat16, LLAMA3),
    "a rope a layer": KVLayout(3, 1, 32, torch.float16, LayeredRope((rope(32), rope(32, 1.3), rope(32)))),
    "128 layers": KVLayout(128, 1, 16, torch.bfloat16, rope(16)),
}


def make_tensors(layout: KVLayout, tokens: int, seed: int = 0, start: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values and token ids: correlated across layers as real ones are, one channel constant, one large."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 16, generator=rng) @ torch.randn(16, layout.values_per_token, generator=torch.Generator().manual_seed(1))
    x += 0.3 * torch.randn(x.shape, generator=rng)
    x[:, 3], x[:, 7] = 2.5, x[:, 7] * 20
    keys, values = x.view(tokens, 2, layout.layers, layout.kv_heads, layout.head_dim).permute(1, 2, 3, 0, 4)
    keys = layout.rope.rotate(keys.contiguous(), torch.arange(start, start + tokens))
    ids = torch.randint(0, VOCABULARY, (tokens,), generator=rng)
    return keys.to(layout.dtype), values.contiguous().to(layout.dtype), ids


@cache
def tiny_profile(layout: KVLayout, seed: int = 0):
    """A profile calibrated on random data: bad at compressing, good enough to encode and decode."""
    samples = []
    for number in range(4):
        keys, values, ids = make_tensors(layout, 48, seed * 100 + number)
        samples.append(KVSample(keys, values, 0, ids))
    return calibrate(layout, samples, torch.randn(VOCABULARY, 8, generator=torch.Generator().manual_seed(seed)))


@cache
def make_codec(name: str, layout: KVLayout) -> Codec:
    """The codec with its default options."""
    return create(name, layout, tiny_profile(layout) if codec_class(name).uses_profile else None)
