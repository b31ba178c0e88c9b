"""The transform codec on shapes, types and inputs that it must take, and on those that it must refuse."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest
import torch

from kvstore.block import EncodedBlock
from kvstore.codecs import KVSample, Profile, calibrate, create
from kvstore.codecs.base import relative_error
from kvstore.errors import ConfigError, CorruptBlockError, InvalidInputError, LayoutMismatchError
from kvstore.layout import KVLayout, RopeSpec

VOCABULARY = 50


def rope(dim: int, scale: float = 1.0, interleaved: bool = False) -> RopeSpec:
    return RopeSpec(tuple(10_000.0 ** (-2 * i / dim) for i in range(dim // 2)), scale, interleaved)


LAYOUTS = {
    "one layer, no rope": KVLayout(1, 1, 32, torch.float32),
    "mqa": KVLayout(3, 1, 64, torch.float32, rope(64)),
    "partial rope": KVLayout(2, 3, 32, torch.float32, rope(16)),
    "yarn scale, interleaved": KVLayout(2, 2, 32, torch.float16, rope(32, 1.2, True)),
    "wide heads": KVLayout(2, 1, 256, torch.bfloat16, rope(256)),
    "deep": KVLayout(128, 1, 32, torch.bfloat16, rope(32)),
}


def sample(layout: KVLayout, tokens: int, start: int = 0, seed: int = 0, grads: bool = True) -> KVSample:
    """Correlated K and V that depend on the token, a constant channel among them."""
    rng = torch.Generator().manual_seed(1)
    width = layout.values_per_token
    mix = torch.randn(24, width, generator=rng)
    by_token = torch.randn(VOCABULARY, width, generator=rng)
    rng.manual_seed(100 + seed)
    ids = torch.randint(0, VOCABULARY, (tokens,), generator=rng)
    noise = torch.logspace(0, -2, width) * torch.randn(tokens, width, generator=rng)
    x = torch.randn(tokens, 24, generator=rng) @ mix + by_token[ids] + noise
    x[:, 5] = 3.0
    k, v = x.view(tokens, 2, layout.layers, layout.kv_heads, layout.head_dim).permute(1, 2, 3, 0, 4)
    k = layout.rope.rotate(k.contiguous(), start + torch.arange(tokens))
    g = [torch.randn(k.shape, generator=rng) for _ in range(2)] if grads else [None, None]
    return KVSample(k.to(layout.dtype), v.contiguous().to(layout.dtype), start, ids, *g)


@cache
def profile(name: str, grads: bool = True, embeddings: bool = True) -> Profile:
    layout = LAYOUTS[name]
    table = torch.randn(VOCABULARY, 12, generator=torch.Generator().manual_seed(2)) if embeddings else None
    return calibrate(layout, [sample(layout, 80, 0, i, grads) for i in range(6)], table)


def error(codec_out: tuple[torch.Tensor, torch.Tensor], s: KVSample) -> tuple[float, float]:
    return tuple(relative_error(x[None], y[None])[0] for x, y in zip((s.keys, s.values), codec_out, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layer_of_precision_decodes_to_the_error_it_declares(name: str) -> None:
    layout = LAYOUTS[name]
    codec = create("transform", layout, profile(name), ratio=4.0, layers=(16, 8, 4))
    s = sample(layout, 64, 64, 9)
    block = EncodedBlock.from_bytes(codec.encode(s.keys, s.values, start=64, tokens=s.tokens).to_bytes())
    assert block.fidelities == (1, 2, 3)
    before = float("inf")
    for fidelity in block.fidelities:
        found = error(codec.decode(block.truncate(fidelity), tokens=s.tokens), s)
        declared = block.distortion[fidelity]
        assert found == pytest.approx((declared.keys, declared.values), rel=0.15, abs=1e-4)
        assert sum(found) < before
        before = sum(found)


def test_the_whole_blob_meets_the_ratio_at_every_layer() -> None:
    layout = LAYOUTS["deep"]
    codec = create("transform", layout, profile("deep"), ratio=8.0)
    sizes = {1: 0, 2: 0, 3: 0}
    for i in range(16):
        s = sample(layout, 64 if i < 15 else 40, 64 * i, 20 + i)  # the last one is not full
        block = codec.encode(s.keys, s.values, start=64 * i, tokens=s.tokens)
        for fidelity in sizes:
            sizes[fidelity] += len(block.truncate(fidelity).to_bytes())
    for fidelity, ratio in {1: 32, 2: 16, 3: 8}.items():
        assert layout.raw_bytes(64 * 15 + 40) / sizes[fidelity] == pytest.approx(ratio, rel=0.03)


@pytest.mark.parametrize("tokens", [1, 2, 17, 1024])
@pytest.mark.parametrize("start", [0, 640])
def test_blocks_of_any_length(tokens: int, start: int) -> None:
    layout = LAYOUTS["mqa"]
    codec = create("transform", layout, profile("mqa"), ratio=1.25, layers=(1.25,))
    s = sample(layout, tokens, start, 3)
    block = EncodedBlock.from_bytes(codec.encode(s.keys, s.values, start=start, tokens=s.tokens).to_bytes())
    k, v = codec.decode(block, tokens=s.tokens)
    assert k.shape == s.keys.shape and max(error((k, v), s)) < 0.5
    if start == 0:
        assert torch.equal(k[:, :, 0], s.keys[:, :, 0].half().float()) and torch.equal(v[:, :, 0], s.values[:, :, 0].half().float())


def test_a_large_first_token_is_kept_in_bfloat16() -> None:
    layout = LAYOUTS["mqa"]
    s = sample(layout, 8)
    s.values[:, :, 0] = 1e6
    codec = create("transform", layout, profile("mqa"))
    _, v = codec.decode(codec.encode(s.keys, s.values, start=0, tokens=s.tokens), tokens=s.tokens)
    assert torch.equal(v[:, :, 0], s.values[:, :, 0].bfloat16().float())


@pytest.mark.parametrize(("grads", "embeddings"), [(False, True), (True, False), (False, False)])
def test_profiles_without_gradients_or_embeddings(grads: bool, embeddings: bool) -> None:
    layout = LAYOUTS["partial rope"]
    codec = create("transform", layout, profile("partial rope", grads, embeddings), ratio=4.0)
    s = sample(layout, 64, 64, 5)
    tokens = s.tokens if embeddings else None
    block = codec.encode(s.keys, s.values, start=64, tokens=tokens)
    assert sum(error(codec.decode(block, tokens=tokens), s)) < 0.2


def test_a_batch_is_its_blocks_and_threads_change_nothing() -> None:
    layout = LAYOUTS["mqa"]
    codec = create("transform", layout, profile("mqa"), ratio=8.0)
    parts = [sample(layout, 64, 64 * i, i) for i in range(5)]
    keys, values, tokens = (torch.stack([getattr(p, n) for p in parts]) for n in ("keys", "values", "tokens"))
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            blocks = codec.encode(keys, values, start=[p.start for p in parts], tokens=tokens)
            results.append(([b.to_bytes() for b in blocks], codec.decode(blocks, tokens=tokens)))
    finally:
        torch.set_num_threads(threads)
    for blobs, (k, v) in results[1:]:
        assert blobs == results[0][0] and torch.equal(k, results[0][1][0]) and torch.equal(v, results[0][1][1])
    for part, blob, k in zip(parts, *results[0][:1], results[0][1][0], strict=True):
        alone, _ = codec.decode(EncodedBlock.from_bytes(blob), tokens=part.tokens)
        assert torch.allclose(alone, k, rtol=1e-3, atol=1e-3)


def test_max_divergence_sets_the_rate() -> None:
    layout = LAYOUTS["mqa"]
    s = sample(layout, 64, 64, 4)
    sizes = []
    for limit in (100.0, 10.0, 1.0):
        codec = create("transform", layout, profile("mqa"), max_divergence=limit)
        block = codec.encode(s.keys, s.values, start=64, tokens=s.tokens)
        assert block.expected_divergence <= limit * 1.001
        assert block.truncate(1).expected_divergence >= block.expected_divergence
        sizes.append(len(block.to_bytes()))
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    finest = create("transform", layout, profile("mqa"), max_divergence=1e-12)
    outlier = s.values.clone()
    outlier[0, 0, 5, 3] = 1e4
    for values in (s.values, outlier):
        k, v = finest.decode(finest.encode(s.keys, values, start=64, tokens=s.tokens), tokens=s.tokens)
        assert max(relative_error(s.keys[None], k[None]) + relative_error(values[None], v[None])) < 1e-3, "no number is cut off"


def test_zeros_and_outliers_survive() -> None:
    layout = LAYOUTS["mqa"]
    codec = create("transform", layout, profile("mqa"), ratio=2.0)
    s = sample(layout, 64, 64, 4)
    for keys in (torch.zeros_like(s.keys), s.keys * 1e4, s.keys * 1e-20):
        block = codec.encode(keys, s.values, start=64, tokens=s.tokens)
        k, _ = codec.decode(block, tokens=s.tokens)
        assert torch.isfinite(k).all() and (k - keys).square().mean() < 0.5 * (keys.square().mean() + s.keys.square().mean())


def test_mutated_payloads_are_corrupt_or_decode_and_nothing_else() -> None:
    layout = LAYOUTS["mqa"]
    codec = create("transform", layout, profile("mqa"), ratio=8.0)
    s = sample(layout, 16, 0, 4)
    block = codec.encode(s.keys, s.values, start=0, tokens=s.tokens)
    rng, refused = random.Random(0), 0
    for _ in range(600):
        payload = [bytearray(p) for p in block.payload]
        part = payload[rng.randrange(len(payload))]
        for _ in range(rng.choice((1, 1, 3))):
            part[rng.choice((rng.randrange(len(part)), rng.randrange(min(16, len(part)))))] = rng.randrange(256)
        if rng.random() < 0.3:
            del part[rng.randrange(len(part)) :]
        forged = EncodedBlock(replace(block.header, tokens=rng.choice((16, 16, 16, 15))), tuple(bytes(p) for p in payload))
        try:
            codec.decode(forged, tokens=s.tokens[: forged.header.tokens])
        except CorruptBlockError:
            refused += 1
    assert refused > 300


def test_what_does_not_belong_together_is_refused() -> None:
    layout = LAYOUTS["mqa"]
    with pytest.raises(LayoutMismatchError):
        create("transform", LAYOUTS["partial rope"], profile("mqa"))
    with pytest.raises(LayoutMismatchError, match="rotary"):
        create("transform", replace(layout, rope=rope(32)), profile("mqa"))
    with pytest.raises(ConfigError, match="calibrate"):
        create("transform", layout)
    codec = create("transform", layout, profile("mqa"))
    s = sample(layout, 16)
    with pytest.raises(InvalidInputError, match="token ids"):
        codec.encode(s.keys, s.values, start=0)
    with pytest.raises(InvalidInputError, match="vocabulary"):
        codec.encode(s.keys, s.values, start=0, tokens=s.tokens + VOCABULARY)
    long = sample(layout, 1025)
    with pytest.raises(InvalidInputError, match="1024"):
        codec.encode(long.keys, long.values, start=0, tokens=long.tokens)
    block = codec.encode(s.keys, s.values, start=0, tokens=s.tokens)
    with pytest.raises(CorruptBlockError, match="2000 tokens"):
        codec.decode(EncodedBlock(replace(block.header, tokens=2000), block.payload), tokens=torch.zeros(2000, dtype=torch.int64))
    other = create("transform", layout, profile("mqa", False))
    with pytest.raises(LayoutMismatchError, match="profile"):
        other.decode(codec.encode(s.keys, s.values, start=0, tokens=s.tokens), tokens=s.tokens)


@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"ratio": 8.0, "layers": (8, 16)}, {"layers": ()}, {"max_divergence": 0.0}])
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        create("transform", LAYOUTS["mqa"], profile("mqa"), **options)
