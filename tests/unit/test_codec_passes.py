"""The codecs' path for accelerators, run on the CPU: the same payloads bit for bit, and the same values as block by block."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from kvstore.codecs import batched, codec_class, create, names, parallel, transfer
from kvstore.codecs.base import Stored
from kvstore.codecs.batched import BatchedCodec
from kvstore.errors import CorruptBlockError
from tests.codec_support import LAYOUTS, make_tensors

NAMES = [name for name in names() if issubclass(codec_class(name), BatchedCodec)]
CPU = torch.device("cpu")
every_codec = pytest.mark.parametrize("name", NAMES)
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def cut(x, tokens):
    """[L, H, T, D] of a live cache as a view of blocks [B, L, H, tokens, D]."""
    return x.unflatten(2, (-1, tokens)).permute(2, 0, 1, 3, 4)


def stored(coded, starts, tokens):
    return [Stored(start, tokens, (memoryview(one.layers[0]),)) for one, start in zip(coded, starts, strict=True)]


def test_the_codecs_without_a_profile_take_many_blocks_at_once():
    assert set(NAMES) == {"raw", "int8", "fp8", "int4", "int2"}


@every_layout
@pytest.mark.parametrize("tokens", [1, 33])
@every_codec
def test_passes_give_the_payloads_and_values_of_single_blocks(name, layout, tokens, monkeypatch):
    monkeypatch.setattr(batched, "_PASS_VALUES", 2 * layout.values_per_token * tokens)
    codec, starts = create(name, layout), [0, tokens, 2 * tokens, 0, 4 * tokens]
    keys, values, _ = make_tensors(layout, tokens * len(starts))
    batch = [cut(x, tokens) for x in (keys, values)]
    want, got = codec._encode_on_cpu(*batch, starts), list(codec._encode_in_passes(*batch, starts))
    for a, b in zip(want, got, strict=True):
        assert bytes(a.layers[0]) == bytes(b.layers[0])
        assert tuple(b.distortions[0]) == pytest.approx(tuple(a.distortions[0]), rel=1e-3, abs=1e-12)
    alone, together = ([torch.full_like(x, 7.0) for x in (keys, values)] for _ in range(2))
    codec._decode_on_cpu(stored(want, starts, tokens), *(cut(x, tokens) for x in alone))
    codec._decode_in_passes(stored(got, starts, tokens), *(cut(x, tokens) for x in together))
    for a, b in zip(alone, together, strict=True):
        if name.startswith("int") and name != "int8":  # the native loops turn and add in another order
            assert torch.allclose(a.float(), b.float(), rtol=2.0**-7, atol=1e-4 * float(a.float().abs().max()))
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "raw"])
@pytest.mark.parametrize("damaged", [0, 2])
def test_one_damaged_block_is_enough_to_refuse_them_all(name, damaged, monkeypatch):
    layout, starts = LAYOUTS["mha"], [8, 16, 24]
    monkeypatch.setattr(batched, "_PASS_VALUES", 2 * layout.values_per_token * 8)
    codec = create(name, layout)
    keys, values, _ = make_tensors(layout, 24)
    blocks = stored(codec._encode_on_cpu(cut(keys, 8), cut(values, 8), starts), starts, 8)
    payload = bytearray(blocks[damaged].layers[0])
    payload[0:2] = b"\x80\x7f"  # infinity in bfloat16; the first scale or offset lies first
    blocks[damaged] = Stored(starts[damaged], 8, (memoryview(payload),))
    with pytest.raises(CorruptBlockError, match="not finite"):
        codec._decode_in_passes(blocks, cut(keys, 8), cut(values, 8))


def test_an_fp8_code_that_is_not_a_number_is_refused():
    layout = LAYOUTS["mha"]
    codec = create("fp8", layout)
    keys, values, _ = make_tensors(layout, 8)
    (block,) = codec._encode_on_cpu(keys[None], values[None], [8])
    for code in (0x7F, 0xFF):
        payload = bytearray(block.layers[0])
        payload[-1] = code
        with pytest.raises(CorruptBlockError, match="not finite"):
            codec._decode_in_passes([Stored(8, 8, (memoryview(payload),))], keys[None], values[None])


def test_a_pass_holds_blocks_of_one_size_and_no_more_than_it_may(monkeypatch):
    codec = create("int4", LAYOUTS["mha"])
    assert list(codec._passes([0, 8, 16, 0, 0], 8)) == [slice(0, 1), slice(1, 3), slice(3, 5)]
    monkeypatch.setattr(batched, "_PASS_VALUES", 1)
    assert list(codec._passes([8, 16], 8)) == [slice(0, 1), slice(1, 2)]
    assert list(create("int8", LAYOUTS["mha"])._passes([0], 8)) == [slice(0, 1)]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_what_is_uploaded_comes_back(count, monkeypatch):
    monkeypatch.setattr(transfer, "_PIECE_BYTES", 10)
    rng = np.random.default_rng(0)
    batches = [[rng.integers(0, 256, 37, dtype=np.uint8).tobytes() for _ in range(3)] for _ in range(count)]
    given = [[memoryview(a), bytearray(b), memoryview(b"x" + c)[1:]] for a, b, c in batches]
    there = list(transfer.uploads(given, CPU))
    assert all(x.shape == (3, 37) for x in there)
    downloads = [transfer.begin_download(*x) for x in there]
    assert [[row.numpy().tobytes() for row in arrived()] for arrived in downloads] == batches


@pytest.mark.parametrize("threads", [1, 2])
def test_work_is_begun_as_it_comes(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    first_is_done = threading.Event()

    def items():
        yield 1
        assert threads == 1 or first_is_done.wait(30)
        yield 2

    def double(i):
        first_is_done.set()
        return 2 * i

    assert parallel.begin(double, items())() == [2, 4]
