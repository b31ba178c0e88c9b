"""The pieces that codecs are made of, each against a plain reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstore.block import EncodedBlock
from kvstore.codecs import bits, create, grouped
from kvstore.codecs.base import Stored, relative
from kvstore.codecs.memory import bytes_of, tensor_from_buffer, wide
from kvstore.codecs.scaled import ScaledByteCodec
from kvstore.codecs.scales import largest_scale, round_down, round_up
from kvstore.errors import CorruptBlockError
from kvstore.layout import KVLayout
from tests.codec_support import LAYOUTS, make_tensors


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_native_loops_of_byte_codecs_give_the_bits_of_the_torch_code(name, layout, tokens):
    codec = create(name, layout)
    keys, values, _ = make_tensors(layout, tokens)
    native = codec._encode(keys[None], values[None], [0], None)[0]
    plain = ScaledByteCodec._encode_on_cpu(codec, keys[None], values[None], [0])[0]
    assert bytes(native.layers[0]) == bytes(plain.layers[0])
    assert native.distortions[0].keys == pytest.approx(plain.distortions[0].keys, rel=1e-3)
    outs = [[torch.empty(1, *keys.shape, dtype=layout.dtype) for _ in range(2)] for _ in range(2)]
    stored = [Stored(0, tokens, (memoryview(native.layers[0]),))]
    codec._decode_on_cpu(stored, *outs[0])
    codec._decode_in_passes(stored, *outs[1])
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("name", ["int4", "int2"])
def test_native_loops_of_grouped_codecs_give_what_the_torch_code_gives(name, layout, tokens, monkeypatch):
    codec = create(name, layout)
    keys, values, _ = make_tensors(layout, tokens)
    for start in (0, 64):
        block = codec.encode(keys, values, start=start)
        native = codec.decode(block)
        with monkeypatch.context() as patch:
            patch.setattr(type(codec), "_restore_native", restore_with_torch)
            plain = codec.decode(block)
        for a, b in zip(native, plain, strict=True):
            assert torch.allclose(a.float(), b.float(), rtol=2.0**-7, atol=1e-4 * float(b.float().abs().max()))


def restore_with_torch(codec, out, fit, payload, codes_at, *, by_channel):
    """What a device without native loops does with the same arguments."""
    rows = tensor_from_buffer(payload).view(codec.layout.layers, -1)
    size = out.shape[1] * out.shape[2] * grouped.packed_bytes(out.shape[3], codec.bits)
    packed = rows[:, codes_at : codes_at + size].reshape(*out.shape[:3], -1)
    codec._restore(out, fit, grouped.unpack(packed, codec.bits, out.shape[3]), by_channel=by_channel)


def test_an_fp8_code_that_is_not_a_number_is_corrupt():
    layout = LAYOUTS["mha"]
    keys, values, _ = make_tensors(layout, 8)
    codec = create("fp8", layout)
    block = codec.encode(keys, values, start=8)
    for code in (0x7F, 0xFF):
        payload = bytearray(block.payload[0])
        payload[-1] = code
        with pytest.raises(CorruptBlockError, match="not finite"):
            codec.decode(EncodedBlock.build(block.header, [bytes(payload)]))


@pytest.mark.parametrize("name", ["int8", "fp8", "int4", "int2"])
def test_a_scale_that_is_not_finite_is_corrupt(name):
    layout = LAYOUTS["mha"]
    keys, values, _ = make_tensors(layout, 8)
    codec = create(name, layout)
    block = codec.encode(keys, values, start=8)
    payload = bytearray(block.payload[0])
    payload[0:2] = b"\x80\x7f"  # infinity in bfloat16; the first scale or offset lies first
    with pytest.raises(CorruptBlockError, match="not finite"):
        codec.decode(EncodedBlock.build(block.header, [bytes(payload)]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_up_and_down_brackets_every_number_within_one_step(dtype):
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 3, 20_000)
    down = round_down(x, dtype)
    assert (down.float() <= x).all() and (torch.nextafter(down, torch.full_like(down, float("inf"))).float() > x).all()
    up = round_up(x.abs(), dtype)
    assert (up.float() >= x.abs()).all() and (torch.nextafter(up, torch.zeros_like(up)).float() < x.abs()).all()
    assert torch.equal(round_up(up.float(), dtype), up) and torch.equal(round_down(up.float(), dtype), up)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("top", [127.0, 448.0])
def test_the_largest_scale_is_the_last_that_stays_finite(dtype, top):
    scale = largest_scale(dtype, top)
    assert torch.isfinite(torch.tensor(scale * top, dtype=torch.float64).to(dtype))
    assert scale * top > torch.finfo(dtype).max * 0.98


@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_bit_runs_come_back(runs, length, seed):
    rng = np.random.default_rng(seed)
    peaks = rng.integers(0, 2 ** (bits.MAX_WIDTH - 1), runs)
    numbers = np.stack([rng.integers(-p, p + 1, length) for p in peaks])
    widths = bits.width_of(np.abs(numbers).max(1))
    packed = bits.pack(numbers, widths)
    assert len(packed) == bits.packed_bytes(widths, length)
    assert np.array_equal(bits.unpack(packed, widths, length), numbers)
    with pytest.raises(CorruptBlockError):
        bits.unpack(packed + b"\0", widths, length)


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("channels", [1, 7, 64, 80])
def test_planes_of_codes_come_back(width, channels):
    codes = torch.randint(0, 2**width, (3, 5, channels), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = grouped.pack(codes, width)
    assert packed.shape[-1] == grouped.packed_bytes(channels, width)
    assert torch.equal(grouped.unpack(packed, width, channels), codes)


@pytest.mark.parametrize("channels", [1, 7, 64, 80, 96])
def test_the_hadamard_matrix_undoes_itself(channels):
    h = grouped.hadamard(channels)
    assert torch.equal(h, h.T) and torch.allclose(h @ h, torch.eye(channels), atol=1e-6)


def test_parts_are_stored_layer_by_layer_and_read_at_any_address():
    parts = torch.arange(12, dtype=torch.int16).view(3, 4), torch.arange(6, dtype=torch.uint8).view(3, 2)
    data = bytes_of(*parts)
    shifted = memoryview(b"x" + data)[1:]
    rows = tensor_from_buffer(shifted).view(3, 10)
    assert torch.equal(wide(rows[:, :8], torch.int16, 3, 4), parts[0]) and torch.equal(rows[:, 8:], parts[1])


def test_relative_error_of_nothing_of_zeros_and_of_overflow():
    assert relative(0.0, 0.0) == 0.0 and relative(1.0, 0.0) == 1.0 and relative(1.0, 4.0) == 0.25
    assert relative(float("inf"), float("inf")) == 1.0


def layers(tokens: int) -> tuple[KVLayout, torch.Tensor, torch.Tensor]:
    layout = KVLayout(6, 3, 64, torch.bfloat16)
    keys, values, _ = make_tensors(layout, tokens)
    return layout, keys, values


@pytest.mark.parametrize("ratio", [2.5, 4.0, 10.0])
def test_svd_meets_the_ratio_with_the_whole_blob(ratio):
    layout, keys, values = layers(256)
    block = create("svd", layout, ratio=ratio).encode(keys, values, start=0)
    assert 1 <= layout.raw_bytes(256) / len(block.to_bytes()) / ratio < 1.02


def test_svd_keeps_the_energy_that_it_was_asked_for():
    layout, keys, values = layers(128)
    sizes = []
    for energy in (0.9, 0.99, 0.999):
        block = create("svd", layout, energy=energy).encode(keys, values, start=64)
        worst = block.distortion[1]
        assert max(worst.keys, worst.values) < 2.5 * (1 - energy)
        sizes.append(len(block.to_bytes()))
    assert sizes == sorted(sizes)


def test_the_first_token_of_a_sequence_is_exact_where_it_is_promised():
    layout, keys, values = layers(32)
    for name in ("int4", "int2", "svd"):
        codec = create(name, layout)
        first = [codec.decode(codec.encode(keys, values, start=start)) for start in (0, 32)]
        assert torch.equal(first[0][0][:, :, 0], keys[:, :, 0]) and torch.equal(first[0][1][:, :, 0], values[:, :, 0])
        assert not torch.equal(first[1][0][:, :, 0], keys[:, :, 0])
