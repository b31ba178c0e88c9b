"""What every codec of the table must do, whatever the shape, type and content of the cache."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from kvstore.block import SECTIONS, EncodedBlock
from kvstore.codecs import CODECS, base, codec_class, codec_for_wire_id, create, names
from kvstore.codecs.base import relative_error
from kvstore.errors import ConfigError, CorruptBlockError, InvalidInputError, LayoutMismatchError
from kvstore.layout import KVLayout
from tests.codec_support import LAYOUTS, make_codec, make_tensors, tiny_profile

#: Wire ids are for ever: a block written today must name the same codec in any later version.
WIRE_IDS = {"raw": 1, "int8": 2, "int4": 3, "int2": 4, "fp8": 5, "svd": 6, "transform": 7}
GQA = LAYOUTS["gqa fp16"]
every_codec = pytest.mark.parametrize("name", names())
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def assert_same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def errors(given, decoded) -> list[float]:
    return relative_error(torch.stack(given), torch.stack(decoded))


def test_wire_ids_are_those_that_were_ever_written():
    assert {name: codec_class(name).wire_id for name in names()} == WIRE_IDS
    assert all(codec_class(name).name == name and codec_for_wire_id(number) is codec_class(name) for name, number in WIRE_IDS.items())
    with pytest.raises(LayoutMismatchError, match="not known to this version"):
        codec_for_wire_id(999)


def test_unknown_names_and_options_are_refused_naming_the_known_ones():
    with pytest.raises(ConfigError, match="raw, int8"):
        create("zip", GQA)
    with pytest.raises(ConfigError, match="ratio"):
        create("svd", GQA, rank=3)
    for ratio in (0.5, 1000.0):
        with pytest.raises(ConfigError, match="between 1 and 64"):
            create("svd", GQA, ratio=ratio)
    with pytest.raises(ConfigError, match="energy"):
        create("svd", GQA, energy=1.5)
    for name, options in (
        ("svd", {"ratio": "4"}),
        ("transform", {"ratio": None}),
        ("transform", {"layers": 8}),
        ("transform", {"layers": "x"}),
    ):
        with pytest.raises(ConfigError, match="cannot take the options"):
            create(name, GQA, tiny_profile(GQA), **options)


@pytest.mark.parametrize("name", [n for n in CODECS if codec_class(n).uses_profile])
def test_a_codec_that_needs_a_profile_says_how_to_make_one(name):
    for given in (None, "model.profile", {}):
        with pytest.raises(ConfigError, match="calibrate"):
            create(name, GQA, given)


@every_layout
@every_codec
def test_round_trip_is_as_distorted_as_the_block_says(name, layout):
    codec = make_codec(name, layout)
    cases = ((37, 64), (64, 0), (64, 4096), (1, 0), (1, 5))
    for tokens, start in cases if layout.layers < 100 else cases[:1]:
        keys, values, ids = make_tensors(layout, tokens, tokens, start)
        before = keys.clone(), values.clone()
        blob = codec.encode(keys, values, start=start, tokens=ids).to_bytes()
        assert_same(before, (keys, values))
        block = EncodedBlock.from_bytes(blob)
        for fidelity in block.fidelities:
            decoded = codec.decode(block, tokens=ids, fidelity=fidelity)
            assert all(d.dtype == layout.dtype and d.shape == keys.shape and torch.isfinite(d).all() for d in decoded)
            told = block.distortion[fidelity]
            found = errors((keys, values), decoded)
            # A codec with a profile adds its errors up in the coefficients, whose basis is only nearly orthogonal on so little data.
            assert (told.keys, told.values) == pytest.approx(found, rel=0.25 if codec.uses_profile else 0.05, abs=1e-6)
            if codec.worst_error is not None:
                for given, got in zip((keys, values), decoded, strict=True):
                    assert (got.double() - given.double()).abs().max() <= codec.worst_error * given.double().abs().max()
        assert blob == codec.encode(keys, values, start=start, tokens=ids).to_bytes(), "the same input must give the same bytes"


@every_codec
def test_a_thousand_tokens_in_one_block(name):
    layout = LAYOUTS["one layer"]
    keys, values, ids = make_tensors(layout, 1024)
    codec = make_codec(name, layout)
    decoded = codec.decode(codec.encode(keys, values, start=0, tokens=ids), tokens=ids)
    assert max(errors((keys, values), decoded)) < 0.4


@every_codec
def test_a_batch_gives_the_same_blocks_and_decodes_into_a_live_cache(name):
    codec = make_codec(name, GQA)
    parts = [make_tensors(GQA, 16, seed, seed * 16) for seed in range(3)]
    keys, values, ids = (torch.stack(column) for column in zip(*parts, strict=True))
    batch = codec.encode(keys, values, start=[0, 16, 32], tokens=ids)
    single = [codec.encode(k, v, start=16 * i, tokens=t) for i, (k, v, t) in enumerate(parts)]
    assert [b.to_bytes() for b in batch] == [b.to_bytes() for b in single]
    caches = [torch.full((GQA.layers, GQA.kv_heads, 50, GQA.head_dim), 7.0, dtype=GQA.dtype) for _ in range(2)]
    views = tuple(c[:, :, 1:49].unflatten(2, (3, 16)).permute(2, 0, 1, 3, 4) for c in caches)
    codec.decode(batch, tokens=ids, out=views)
    apart = [codec.decode(b, tokens=t) for b, t in zip(single, ids, strict=True)]
    for i, cache in enumerate(caches):
        assert torch.equal(cache[:, :, 1:49], torch.cat([pair[i] for pair in apart], 2))
        assert (cache[:, :, [0, 49]] == 7.0).all(), "nothing outside of the view may change"


@every_codec
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused_by_name(name, bad):
    keys, values, ids = make_tensors(GQA, 8)
    for tensor in (keys, values):
        spoilt = tensor.clone()
        spoilt[1, 0, 3, 5] = bad
        pair = (spoilt, values) if tensor is keys else (keys, spoilt)
        with pytest.raises(InvalidInputError, match="NaN or Inf"):
            make_codec(name, GQA).encode(*pair, start=0, tokens=ids)


@every_codec
def test_constant_tiny_zero_and_large_values(name):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        layout = replace(LAYOUTS["one layer"], dtype=dtype)
        codec = make_codec(name, layout)
        for value in (0.0, 1.0, -3.0, float(torch.finfo(dtype).tiny), 3e4):
            x = torch.full((1, 1, 20, 32), value, dtype=dtype)
            ids = torch.zeros(20, dtype=torch.int64)
            decoded = codec.decode(codec.encode(x, x, start=0, tokens=ids), tokens=ids)
            assert all(torch.isfinite(d).all() for d in decoded)
            if codec.worst_error is not None:
                assert (decoded[0].double() - x.double()).abs().max() <= codec.worst_error * abs(value)


@pytest.mark.parametrize("name", ["raw", "int8", "fp8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_largest_values_of_a_type_stay_finite(name, dtype):
    layout = KVLayout(1, 1, 64, dtype)
    x = (torch.rand(1, 1, 9, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1).double() * torch.finfo(dtype).max
    x[..., 5], x[..., 6] = torch.finfo(dtype).max, torch.finfo(dtype).min
    x = x.to(dtype)
    codec = create(name, layout)
    for decoded in codec.decode(codec.encode(x, x, start=8)):
        assert torch.isfinite(decoded).all()
        assert ((decoded.double() - x.double()).abs() <= codec.worst_error * torch.finfo(dtype).max).all()


@every_codec
def test_tensors_that_do_not_fit_the_layout_are_refused(name):
    codec = make_codec(name, GQA)
    keys, values, ids = make_tensors(GQA, 8)
    wrong = [(keys[:3], values[:3]), (keys[..., :32], values[..., :32]), (keys, values[:, :, :7]), (keys[0], values[0])]
    for pair in wrong:
        with pytest.raises(LayoutMismatchError):
            codec.encode(*pair, start=0, tokens=ids)
    with pytest.raises(InvalidInputError):
        codec.encode(keys[:, :, :0], values[:, :, :0], start=0, tokens=ids[:0])
    with pytest.raises(InvalidInputError):
        codec.encode(keys.to(torch.int32), values.to(torch.int32), start=0, tokens=ids)
    for start in (-1, 1 << 32, [0, 8], 1.5, "0", None):
        with pytest.raises(InvalidInputError, match="start"):
            codec.encode(keys, values, start=start, tokens=ids)
    with pytest.raises(InvalidInputError, match="tensors"):
        codec.encode(keys.float().numpy(), values.float().numpy(), start=0, tokens=ids)
    if codec.needs_tokens:
        for tokens in ("fox", [1 << 70] * 8, [-1] * 8, [0.5] * 8, ids[:3]):
            with pytest.raises(InvalidInputError, match="token"):
                codec.encode(keys, values, start=0, tokens=tokens)


@every_codec
def test_what_is_no_block_is_not_decoded(name):
    codec = make_codec(name, GQA)
    keys, values, ids = make_tensors(GQA, 8)
    block = codec.encode(keys, values, start=0, tokens=ids)
    for given in (None, [], block.to_bytes(), [block.to_bytes()]):
        with pytest.raises(InvalidInputError, match="from_bytes"):
            codec.decode(given, tokens=ids)
    for fidelity in (0, 9, -1, "1"):
        with pytest.raises(InvalidInputError, match="fidelity"):
            codec.decode(block, tokens=ids, fidelity=fidelity)


@every_codec
def test_blocks_of_another_codec_layout_or_type_are_refused(name):
    codec = make_codec(name, GQA)
    keys, values, ids = make_tensors(GQA, 8)
    block = codec.encode(keys, values, start=0, tokens=ids)
    other = make_codec("int8" if name == "raw" else "raw", GQA).encode(keys, values, start=0, tokens=ids)
    strange = [other, *(EncodedBlock(replace(block.header, **{f: v}), block.payload) for f, v in (
        ("layers", 5), ("kv_heads", 1), ("head_dim", 32), ("dtype", 2), ("profile", b"\1" * 32)
    ))]  # fmt: skip
    for wrong in strange:
        with pytest.raises(LayoutMismatchError):
            codec.decode(wrong, tokens=ids)
    with pytest.raises(InvalidInputError, match="no block"):
        codec.decode([])
    for fidelity in (0, len(block.payload) + 1):
        with pytest.raises(InvalidInputError, match="fidelity"):
            codec.decode(block, tokens=ids, fidelity=fidelity)
    with pytest.raises(InvalidInputError, match="out must be"):
        codec.decode(block, tokens=ids, out=(keys[:, :, :4], values[:, :, :4]))


def test_a_profile_of_another_calibration_is_refused():
    keys, values, ids = make_tensors(GQA, 8)
    block = create("transform", GQA, tiny_profile(GQA)).encode(keys, values, start=0, tokens=ids)
    with pytest.raises(LayoutMismatchError, match="profile"):
        create("transform", GQA, tiny_profile(GQA, seed=1)).decode(block, tokens=ids)
    with pytest.raises(LayoutMismatchError):
        create("transform", LAYOUTS["mha"], tiny_profile(GQA))


@every_codec
def test_payloads_of_another_length_are_corrupt(name):
    codec = make_codec(name, GQA)
    keys, values, ids = make_tensors(GQA, 8)
    block = codec.encode(keys, values, start=8, tokens=ids)
    *lower, top = (bytes(p) for p in block.payload)
    for changed in (b"", top[:-1], top[: len(top) // 2], top + b"\0"):
        wrong = EncodedBlock.build(block.header, [*lower, changed])
        with pytest.raises(CorruptBlockError):
            codec.decode(EncodedBlock.from_bytes(wrong.to_bytes()), tokens=ids)


@every_codec
def test_nothing_global_changes_and_threads_may_share_a_codec(name):
    codec = make_codec(name, GQA)
    keys, values, ids = make_tensors(GQA, 32)
    block = codec.encode(keys, values, start=0, tokens=ids)
    before = torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state(), torch.is_grad_enabled()
    want = codec.decode(block, tokens=ids)
    with ThreadPoolExecutor(4) as pool:
        blobs = list(pool.map(lambda _: codec.encode(keys, values, start=0, tokens=ids).to_bytes(), range(8)))
        got = list(pool.map(lambda _: codec.decode(block, tokens=ids), range(8)))
    assert set(blobs) == {block.to_bytes()}
    for pair in got:
        assert_same(pair, want)
    after = torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state(), torch.is_grad_enabled()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2]) and before[3] == after[3]


@every_layout
@every_codec
def test_layers_that_are_said_to_be_there_stay_as_they_are(name, layout):
    codec, starts = make_codec(name, layout), [0, 32, 64]
    k, v, tokens = (torch.stack(x) for x in zip(*(make_tensors(layout, 32, start, start) for start in starts), strict=True))
    blocks = codec.encode(k, v, start=starts, tokens=tokens)
    want, out, seen = codec.decode(blocks, tokens=tokens), (torch.empty_like(k), torch.empty_like(v)), [0]

    def on_layers(layers: int) -> None:
        assert_same((x[:, :layers] for x in out), (x[:, :layers] for x in want))
        seen.append(layers)

    assert_same(codec.decode(blocks, tokens=tokens, out=out, on_layers=on_layers), want)
    assert seen == sorted(set(seen)) and seen[-1] == layout.layers
    assert len(seen) > 2 or not codec.layerwise or layout.layers < 128  # others are one group


@every_layout
@every_codec
def test_no_layers_are_read_before_they_are_there(name, layout, monkeypatch):
    """The payload of each section comes when it is asked for; until then other bytes stand in its place."""
    monkeypatch.setattr(base, "SECTIONED_FROM_BYTES", 1)
    codec, starts = make_codec(name, layout), [0, 32, 64]
    k, v, tokens = (torch.stack(x) for x in zip(*(make_tensors(layout, 32, start, start) for start in starts), strict=True))
    blocks = codec.encode(k, v, start=starts, tokens=tokens)
    sectioned = codec.layer_major and layout.layers >= SECTIONS
    assert all(bool(block.header.sections) == sectioned for block in blocks)
    coming = [EncodedBlock(block.header, tuple(bytearray(b"\xff" * len(part)) for part in block.payload)) for block in blocks]
    asked, done, want = [], [], codec.decode(blocks, tokens=tokens)
    out = torch.empty_like(k), torch.empty_like(v)

    def ready(layers: int) -> None:
        asked.append(layers)
        for block, whole in zip(coming, blocks, strict=True):
            for there, part in zip(block.payload, whole.payload, strict=True):
                size = len(part) // layout.layers * layers if sectioned else len(part)
                there[:size] = part[:size]

    def on_layers(layers: int) -> None:
        assert_same((x[:, :layers] for x in out), (x[:, :layers] for x in want))
        done.append(layers)

    assert_same(codec.decode(coming, tokens=tokens, out=out, on_layers=on_layers, ready=ready), want)
    if sectioned:
        assert asked == done == [layout.layers * n // SECTIONS for n in range(1, SECTIONS + 1)]
    else:
        assert asked == [layout.layers]
