"""The transform codec's path for accelerators, run on the CPU: the same numbers, bit for bit, and the same values as the native path."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kvstore.block import EncodedBlock
from kvstore.codecs import create
from kvstore.codecs.entropy import rans
from kvstore.codecs.transform import device, kernels, native
from kvstore.codecs.transform.ladder import DITHER, MAX_DROP, MAX_PASSES, Ladder, Ladders, step_sizes
from kvstore.codecs.transform.models import LAW
from kvstore.codecs.transform.projection import Projection
from kvstore.codecs.transform.streams import Streams
from kvstore.errors import CorruptBlockError
from kvstore.settings import environment
from tests.codec_support import LAYOUTS, make_codec, make_tensors, tiny_profile

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class HostDecoded:
    """What `HostDecoder` reads: numbers as `Streams` lays them out, and values by the native loops."""

    projection: Projection
    streams: Streams

    def __post_init__(self) -> None:
        groups, parts, _ = self.streams.rows.shape
        self.numbers, self.written = np.zeros(self.streams.numbers, np.int16), np.zeros(self.streams.numbers, np.bool_)
        self.made = {(g, k): self.job(g, k) for g in range(groups) for k in range(parts)}
        self.intact = torch.tensor([values is not None for values in self.made.values()], dtype=torch.int8)

    def job(self, g: int, k: int) -> np.ndarray | None:
        s, models, kappa, shape = self.streams, self.projection.models, self.projection.kappa[g], self.projection.shape[g]
        words, ladder = np.concatenate(s.words).astype(np.uint16), Ladder.of(s.steps[k, : s.passes[k]].tolist())
        count, tokens = int(s.rows[g, k].max()), int(s.tokens[k])
        cells = np.zeros((count, tokens), np.uint8), np.zeros((count, tokens), np.float32), np.zeros(count, np.uint8)
        for p in range(s.passes[k]):
            now, begin = s.rows[g, k, p], s.word_begin[g, k, p]
            numbers, stream = np.zeros((now, tokens), np.int16), words[begin : begin + s.word_count[g, k, p]]
            tables = kernels.tables_of(kappa, shape, now, p, ladder.steps, ladder.parts, ladder.log_width, models.zero, LAW)
            if not rans.decode(stream, cells[0][:now], tables, numbers, *models.book.arrays):
                return None
            room = s.number_begin[g, k] + p * count * tokens
            self.numbers[room : room + numbers.size] = numbers.reshape(-1)
            self.written[room : room + numbers.size] = True
            kernels.advance(numbers, *cells, kappa, p, ladder.steps, ladder.parts, ladder.width, LAW)
        out, place = np.empty((count, tokens), np.float32), (len(ladder.steps), ladder.steps, ladder.width, ladder.log_width)
        kernels.rebuild(*cells, kappa, shape, *place, models.centre, LAW, out, 0)
        return out

    def values(self, group: int, out: torch.Tensor) -> None:
        for k, (column, tokens) in enumerate(zip(self.streams.columns, self.streams.tokens, strict=True)):
            if (values := self.made[group, k]) is not None:
                out[: len(values), column : column + tokens] = torch.from_numpy(values)


class HostDecoder:
    """Stands in for `TritonDecoder`: the native loops, from the flat arrays that it would read."""

    def __init__(self, projection: Projection) -> None:
        self.projection = projection

    def decode(self, streams: Streams) -> HostDecoded:
        return HostDecoded(self.projection, streams)

    def place(self, group, base, product, places, keys, values):
        blocks, _, heads, length, dim = keys.shape
        rows = (base + product).view(blocks, length, 2, -1, heads, dim).permute(2, 0, 3, 4, 1, 5).clone()
        for layer, (before, pairs, interleaved) in enumerate(places.ropes[group.first : group.last].tolist()):
            cos, sin = (t[before * len(base) :][: len(base) * pairs].view(blocks, 1, length, pairs) for t in (places.cos, places.sin))
            k = rows[0, :, layer]
            first = k[..., 0 : 2 * pairs : 2] if interleaved else k[..., :pairs]
            second = k[..., 1 : 2 * pairs : 2] if interleaved else k[..., pairs : 2 * pairs]
            turned = first * cos - second * sin, second * cos + first * sin
            first.copy_(turned[0]), second.copy_(turned[1])
        target = places.target.view(blocks, length).long()
        for b in range(blocks):
            for out, x in ((keys, rows[0]), (values, rows[1])):
                out[b, group.first : group.last, :, target[b]] = x[b].to(out.dtype)


@pytest.fixture
def on_device(monkeypatch):
    """Every transform codec takes the accelerator's path, on the CPU."""
    monkeypatch.setattr(native, "transform", device.transform)
    monkeypatch.setattr(
        native, "restore", lambda layout, projection, *batch: device.restore(layout, projection, HostDecoder(projection), *batch)
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
    mixed = [blocks[0], *(b.truncate(f) for b, f in zip(blocks[1:], (2, 1), strict=True))]
    decoded[None] = codec.decode(mixed, tokens=ids)
    monkeypatch.undo()
    for a, b in zip(blocks, codec.encode(keys, values, start=starts, tokens=ids), strict=True):
        assert len(a.to_bytes()) == pytest.approx(len(b.to_bytes()), rel=0.02)
    for fidelity, pair in decoded.items():
        native_pair = codec.decode(mixed if fidelity is None else blocks, tokens=ids, fidelity=fidelity)
        for got, want in zip(pair, native_pair, strict=True):
            assert torch.allclose(got.float(), want.float(), rtol=2.0**-6, atol=2e-3 * float(want.float().abs().max()))


def test_many_ladders_at_once_are_the_single_ones():
    rng = np.random.default_rng(3)
    rows = []
    for _ in range(20):
        passes = int(rng.integers(1, MAX_PASSES + 1))
        rows.append((200 - np.cumsum(rng.integers(1, MAX_DROP + 1, passes))).tolist())
    longest = max(len(row) for row in rows)
    steps = np.array([row + row[-1:] * (longest - len(row)) for row in rows], dtype=np.int32)
    made = Ladders.of(steps, step_sizes(steps))
    for i, row in enumerate(rows):
        one = Ladder.of(row)
        for p in range(len(row) + 1):
            for b in range(p):
                for f in range(b + 1):
                    same = np.s_[i, :, p, b, int(f == b)]
                    assert (made.log_width[same] == one.log_width[:, p, f, b]).all() and (made.width[same] == one.width[:, p, f, b]).all()
                    assert p == len(row) or (made.parts[same] == one.parts[:, p, f, b]).all()
    assert made.parts.shape[1] == len(DITHER)


def test_damaged_streams_are_refused(on_device):
    layout = LAYOUTS["mqa fp32"]
    codec = make_codec("transform", layout)
    keys, values, ids = make_tensors(layout, 16, 3, 16)
    block = codec.encode(keys, values, start=16, tokens=ids)
    top = bytearray(block.payload[0])
    top[-3] ^= 0xFF
    told = []
    with pytest.raises(CorruptBlockError):
        codec.decode(replace(block, payload=(bytes(top), *block.payload[1:])), tokens=ids, on_layers=told.append)
    assert not told, "no layer is given before all streams are known to be intact"


#: Runs in a process of its own, where Triton interprets.
PROGRAM = """
import sys
import numpy as np, torch
from kvstore.codecs import create
from kvstore.codecs.transform import device, native
from kvstore.codecs.transform.classes import TokenClasses
from kvstore.codecs.transform.codec import TransformCodec
from kvstore.codecs.transform.triton_decoder import TritonDecoder
from kvstore.errors import CorruptBlockError
from tests.codec_support import LAYOUTS, make_tensors, tiny_profile
from tests.unit.test_transform_device import HostDecoder, damaged

name, ratios, tokens = sys.argv[1], tuple(float(r) for r in sys.argv[2].split(",")), int(sys.argv[3])
layout = LAYOUTS[name]
codec = create("transform", layout, tiny_profile(layout), ratio=ratios[-1], layers=ratios)
parts = [make_tensors(layout, tokens, 3 + i, tokens * i) for i in range(2)]
keys, values, ids = (torch.stack(column) for column in zip(*parts))
mixed = lambda self, projection, k, v, starts: [
    TokenClasses((7 + np.arange(tokens - (start == 0)) // 3 % 2).astype(np.uint8)) for start in starts
]
if "classes" in sys.argv:
    TransformCodec._classes = mixed
    keep = device.Projection.of
    device.Projection.of(codec.profile, layout).harm = torch.zeros(1)
blocks = codec.encode(keys, values, start=[0, tokens], tokens=ids)
want = codec.decode(blocks, tokens=ids)

class Both(TritonDecoder):
    "Numbers must be those of the native loops; where nothing is damaged."
    def decode(self, streams):
        made, host = super().decode(streams), HostDecoder(projection).decode(streams)
        assert torch.equal(made.intact != 0, host.intact != 0), (made.intact, host.intact)
        if made.intact.all():
            assert (made.numbers[:-1].numpy() == host.numbers)[host.written].all()
            for i, group in enumerate(projection.groups):
                out = torch.zeros(2, streams.most_rows(i), 2 * tokens)
                made.values(i, out[0]), host.values(i, out[1])
                assert torch.allclose(*out, rtol=1e-6, atol=0)
        return made

def restore(layout, given, *batch):
    global projection
    projection = given
    return device.restore(layout, given, Both(given), *batch)

native.restore = restore
for a, b in zip(codec.decode(blocks, tokens=ids), want):
    assert torch.allclose(a.float(), b.float(), rtol=2.0**-6, atol=2e-3 * float(b.float().abs().max()))
if "damage" in sys.argv:
    for block in damaged(blocks[1]):
        try:
            codec.decode(block, tokens=ids[1])
        except CorruptBlockError:
            continue
        raise AssertionError("a damaged stream was decoded")
print("equal")
"""


def damaged(block: EncodedBlock) -> list[EncodedBlock]:
    """The block with a byte changed near the end, in the middle, and with words moved from one stream to the next."""
    out = []
    for at in (-3, -30, len(block.payload[0]) // 2):
        top = bytearray(block.payload[0])
        top[at] ^= 0xFF
        out.append(replace(block, payload=(bytes(top), *block.payload[1:])))
    return out


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    "arguments",
    [("one layer", "16,8,4", "12", "damage"), ("one layer", "2", "9", "classes"), ("a rope a layer", "32,8", "4", "classes"),
     ("yarn, interleaved", "16", "2")],
    ids=", ".join,
)  # fmt: skip
def test_interpreted_kernels_read_the_same_numbers_and_values(arguments):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], env=environment(TRITON_INTERPRET="1"), capture_output=True, text=True, timeout=300,
        check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout.strip() == "equal", done.stderr[-3000:]
