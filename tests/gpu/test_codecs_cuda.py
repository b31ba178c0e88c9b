"""Every codec on CUDA tensors: what the CPU wrote is read there, and the other way round. Run by ``make test-gpu``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from kvstore.block import EncodedBlock
from kvstore.codecs import create, names
from kvstore.codecs.base import relative_error
from kvstore.codecs.transform.classes import TokenClasses
from kvstore.codecs.transform.codec import TransformCodec
from kvstore.codecs.transform.projection import Projection
from kvstore.errors import CorruptBlockError
from kvstore.layout import KVLayout
from tests.codec_support import LAYOUTS, make_codec, make_tensors, tiny_profile

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")]
every_codec = pytest.mark.parametrize("name", names())
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def batch(layout, tokens=24):
    parts = [make_tensors(layout, tokens, i, tokens * i) for i in range(3)]
    return [tokens * i for i in range(3)], *(torch.stack(column) for column in zip(*parts, strict=True))


@every_layout
@every_codec
def test_both_devices_read_what_either_wrote(name, layout):
    codec, (starts, keys, values, ids) = make_codec(name, layout), batch(layout)
    there = [x.cuda() for x in (keys, values)]
    for given in ((keys, values), there):
        blocks = [EncodedBlock.from_bytes(b.to_bytes()) for b in codec.encode(*given, start=starts, tokens=ids)]
        on_cpu, on_gpu = codec.decode(blocks, tokens=ids), codec.decode(blocks, tokens=ids, device="cuda")
        for a, b in zip(on_cpu, on_gpu, strict=True):
            assert b.device.type == "cuda"
            assert relative_error(a[None].float(), b.cpu()[None].float())[0] < 1e-4


@every_codec
def test_blocks_decode_into_a_live_cache_on_the_device(name):
    layout = LAYOUTS["gqa fp16"]
    codec, (starts, keys, values, ids) = make_codec(name, layout), batch(layout, 16)
    blocks = codec.encode(keys.cuda(), values.cuda(), start=starts, tokens=ids)
    caches = [torch.full((layout.layers, layout.kv_heads, 50, layout.head_dim), 7.0, dtype=layout.dtype, device="cuda") for _ in range(2)]
    views = tuple(c[:, :, 1:49].unflatten(2, (3, 16)).permute(2, 0, 1, 3, 4) for c in caches)
    codec.decode(blocks, tokens=ids, out=views)
    for cache, want in zip(caches, codec.decode(blocks, tokens=ids, device="cuda"), strict=True):
        assert torch.equal(cache[:, :, 1:49], torch.cat(list(want), 2)) and (cache[:, :, [0, 49]] == 7.0).all()


@pytest.mark.parametrize("ratios", [(16.0,), (32.0, 8.0, 4.0), (64.0, 1.5)], ids=str)
def test_transform_reads_mixed_classes_and_fidelities_there_as_here(ratios, monkeypatch):
    layout = LAYOUTS["a rope a layer"]
    codec, (starts, keys, values, ids) = create("transform", layout, tiny_profile(layout), ratio=ratios[-1], layers=ratios), batch(layout)

    def classes(self, projection, k, v, starts):
        return [TokenClasses((6 + np.arange(24 - (start == 0)) // 5 % 3).astype(np.uint8)) for start in starts]

    monkeypatch.setattr(TransformCodec, "_classes", classes)
    monkeypatch.setattr(Projection.of(codec.profile, layout), "harm", torch.zeros(1))
    blocks = codec.encode(keys, values, start=starts, tokens=ids)
    for used in (blocks, [blocks[0], *(b.truncate(1) for b in blocks[1:])]):
        on_cpu, on_gpu = codec.decode(used, tokens=ids), codec.decode(used, tokens=ids, device="cuda")
        for a, b in zip(on_cpu, on_gpu, strict=True):
            assert relative_error(a[None].float(), b.cpu()[None].float())[0] < 1e-4


def test_damaged_streams_are_refused_on_the_device():
    layout = LAYOUTS["mqa fp32"]
    codec = make_codec("transform", layout)
    keys, values, ids = make_tensors(layout, 16, 3, 16)
    block = codec.encode(keys, values, start=16, tokens=ids)
    payload = bytearray(block.payload[0])
    payload[-3] ^= 0xFF
    with pytest.raises(CorruptBlockError):
        codec.decode(EncodedBlock.build(block.header, [bytes(payload), *block.payload[1:]]), tokens=ids, device="cuda")


@every_layout
@pytest.mark.parametrize("name", ["raw", "int8", "fp8", "int4"])
def test_both_devices_write_the_same_payload(name, layout):
    codec, (starts, keys, values, _) = make_codec(name, layout), batch(layout)
    on_cpu, on_gpu = (codec.encode(*given, start=starts) for given in ((keys, values), (keys.cuda(), values.cuda())))
    for a, b in zip(on_cpu, on_gpu, strict=True):
        assert bytes(a.payload[0]) == bytes(b.payload[0])
        assert tuple(b.distortion[1]) == pytest.approx(tuple(a.distortion[1]), rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("name", ["raw", "int8", "fp8", "int4", "int2"])
@pytest.mark.parametrize("code", [None, 0xFF])
def test_what_is_not_finite_is_refused_on_the_device(name, code):
    layout = LAYOUTS["mha"]
    codec, (starts, keys, values, _) = make_codec(name, layout), batch(layout)
    blocks = codec.encode(keys.cuda(), values.cuda(), start=starts)
    payload = bytearray(blocks[1].payload[0])
    payload[0:2] = b"\x80\x7f"  # infinity in bfloat16; the first scale or offset lies first
    if code is not None:
        payload = bytearray(blocks[1].payload[0])
        payload[-1] = code
    blocks[1] = EncodedBlock.build(blocks[1].header, [bytes(payload)])
    if name == "raw" or (code is not None and name != "fp8"):
        codec.decode(blocks, device="cuda")
    else:
        with pytest.raises(CorruptBlockError, match="not finite"):
            codec.decode(blocks, device="cuda")


@pytest.mark.parametrize("name", ["raw", "int8", "fp8", "int4", "int2"])
def test_threads_on_streams_of_their_own_get_their_own_blocks(name):
    """Many passes a call, so that pinned memory and that of the side streams goes round."""
    layout, tokens, count = KVLayout(8, 8, 128, torch.bfloat16), 256, 24
    codec = make_codec(name, layout)

    def there_and_back(seed):
        with torch.cuda.stream(torch.cuda.Stream()):
            rng = torch.Generator("cuda").manual_seed(seed)
            shape = count, layout.layers, layout.kv_heads, tokens, layout.head_dim
            for _ in range(4):
                given = [torch.randn(shape, generator=rng, device="cuda", dtype=layout.dtype) for _ in range(2)]
                blocks = codec.encode(*given, start=range(0, count * tokens, tokens))
                whole = [EncodedBlock.from_bytes(block.to_bytes()) for block in blocks]  # CRCs of what is there now
                told = [max(block.distortion[1]) for block in whole]
                decoded = codec.decode(whole, device="cuda")
                found = [max(relative_error(x, y)) for x, y in zip(given, decoded, strict=True)]
                assert max(told) == pytest.approx(max(found), rel=0.05, abs=1e-6)
        return True

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(there_and_back, range(3)))
