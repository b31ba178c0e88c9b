"""The transform codec's path for accelerators, run on the CPU: the same cells, bit for bit, and the same values as the native path."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kvstore.codecs import create
from kvstore.codecs.entropy import rans
from kvstore.codecs.transform import device, native
from kvstore.codecs.transform.coder import BlockDecoder
from kvstore.codecs.transform.projection import Projection
from kvstore.errors import CorruptBlockError
from kvstore.settings import environment
from tests.codec_support import LAYOUTS, make_codec, make_tensors, tiny_profile

ROOT = Path(__file__).resolve().parents[2]


class CpuCoder:
    """Stands in for `TritonCoder`, whose kernels are tested against the same coder in `test_entropy_triton.py`."""

    def __init__(self, book):
        self.book = book

    def decode(self, words, contexts, tables):
        numbers = [torch.zeros(c.shape, dtype=torch.int16) for c in contexts]
        columns = zip(words, contexts, tables, numbers, strict=True)
        intact = [rans.decode(*(np.ascontiguousarray(x.numpy()) for x in each[:3]), each[3].numpy(), *self.book.arrays) for each in columns]
        return numbers, intact


@pytest.fixture
def on_device(monkeypatch):
    """Every transform codec takes the accelerator's path, on the CPU."""
    monkeypatch.setattr(native, "transform", device.transform)
    monkeypatch.setattr(
        native, "restore", lambda layout, projection, *batch: device.restore(layout, projection, CpuCoder(projection.models.book), *batch)
    )


@pytest.mark.parametrize("name", ["gqa fp16", "mqa fp32", "partial rope", "yarn, interleaved", "no rope, odd head", "a rope a layer"])
def test_both_paths_make_and_read_the_same_blocks(name, on_device, monkeypatch):
    layout = LAYOUTS[name]
    profile = tiny_profile(layout)
    codec = create("transform", layout, profile, ratio=4.0, layers=(16, 8, 4))
    parts = [make_tensors(layout, 24, 5 + i, 24 * i) for i in range(3)]
    keys, values, ids = (torch.stack(column) for column in zip(*parts, strict=True))
    starts = [0, 24, 48]
    blocks = codec.encode(keys, values, start=starts, tokens=ids)
    decoded = {f: codec.decode(blocks, tokens=ids, fidelity=f) for f in (1, 2, 3)}
    monkeypatch.undo()
    for a, b in zip(blocks, codec.encode(keys, values, start=starts, tokens=ids), strict=True):
        assert len(a.to_bytes()) == pytest.approx(len(b.to_bytes()), rel=0.02)
    for fidelity, pair in decoded.items():
        for got, want in zip(pair, codec.decode(blocks, tokens=ids, fidelity=fidelity), strict=True):
            assert torch.allclose(got.float(), want.float(), rtol=2.0**-6, atol=2e-3 * float(want.float().abs().max()))


def test_the_cells_are_those_of_the_native_loops_bit_for_bit():
    layout = LAYOUTS["gqa fp16"]
    codec = create("transform", layout, tiny_profile(layout), ratio=4.0, layers=(16, 8, 4))
    keys, values, ids = make_tensors(layout, 24, 9, 24)
    payloads = codec._parsed(codec._stored(codec.encode(keys, values, start=24, tokens=ids), None), 1)
    projection = Projection.of(codec.profile, layout)
    ((_, decoder),) = BlockDecoder.of(projection.models, 24, payloads).parts
    kappa, shape = projection.kappa[0], projection.shape[0]
    cells = device._Cells(projection.models, decoder.ladder, kappa, shape, decoder.words[0], 24, torch.device("cpu"))
    device._decode_passes(CpuCoder(projection.models.book), [cells], 0)
    want, nothing = np.empty((len(kappa), 24), np.float32), np.empty((0, 24), np.float32)
    decoder.group(0, kappa, shape, want, nothing, 0, 0)
    assert np.array_equal(cells.values().numpy(), want[: cells.count]) and not want[cells.count :].any()


def test_damaged_streams_are_refused(on_device):
    layout = LAYOUTS["mqa fp32"]
    codec = make_codec("transform", layout)
    keys, values, ids = make_tensors(layout, 16, 3, 16)
    block = codec.encode(keys, values, start=16, tokens=ids)
    top = bytearray(block.payload[0])
    top[-3] ^= 0xFF
    with pytest.raises(CorruptBlockError):
        codec.decode(replace(block, payload=(bytes(top), *block.payload[1:])), tokens=ids)


PROGRAM = """
import torch
from kvstore.codecs.entropy.triton_rans import TritonCoder
from kvstore.codecs.transform import device, native
from tests.codec_support import LAYOUTS, make_codec, make_tensors

layout = LAYOUTS["one layer"]
codec = make_codec("transform", layout)
keys, values, ids = make_tensors(layout, 12, 3, 0)
block = codec.encode(keys, values, start=0, tokens=ids)
want = codec.decode(block, tokens=ids)
native.restore = lambda layout, projection, *batch: device.restore(layout, projection, TritonCoder(projection.models.book, "cpu"), *batch)
for a, b in zip(codec.decode(block, tokens=ids), want):
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_kernel_decodes_a_block_when_interpreted():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment(TRITON_INTERPRET="1"), capture_output=True, text=True, timeout=300, check=False,
        cwd=ROOT,
    )  # fmt: skip
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
