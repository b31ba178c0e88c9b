"""Tokens that matter more are kept finer: their classes on the wire, how they are told, and what they do to a block."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvstore.block import EncodedBlock
from kvstore.codecs import KVSample, calibrate, create
from kvstore.codecs.transform import fit
from kvstore.codecs.transform.classes import CLASSES, USUAL, TokenClasses, arranged, most_classes, put_back
from kvstore.codecs.transform.groups import plan
from kvstore.codecs.transform.moments import Moments, rows_of
from kvstore.errors import CorruptBlockError
from kvstore.layout import KVLayout, RopeSpec

LAYOUT = KVLayout(4, 2, 32, torch.float32, RopeSpec(tuple(100.0 ** (-i / 16) for i in range(16))))


def sample(seed: int, tokens: int = 128, start: int = 0) -> KVSample:
    """Every eighth token has small values, and gradients a hundred times the others'."""
    rng = torch.Generator().manual_seed(seed)
    shape = (LAYOUT.layers, LAYOUT.kv_heads, tokens, LAYOUT.head_dim)
    k, v, gk, gv = (torch.randn(shape, generator=rng) * torch.logspace(0, -2, LAYOUT.head_dim) for _ in range(4))
    marked = torch.arange(start, start + tokens) % 8 == 5
    v[:, :, marked] *= 0.1
    gk[:, :, marked] *= 100
    gv[:, :, marked] *= 100
    return KVSample(k, v, start, torch.zeros(tokens, dtype=torch.int64), gk, gv)


@pytest.mark.parametrize("tokens", [1, 2, 63, 64])
def test_classes_survive_their_bytes_and_damage_is_found(tokens: int) -> None:
    classes = TokenClasses(np.random.default_rng(tokens).integers(0, CLASSES, tokens).astype(np.uint8))
    data = classes.to_bytes()
    assert np.array_equal(TokenClasses.from_bytes(data, tokens).of, classes.of)
    with pytest.raises(CorruptBlockError, match="classes"):
        TokenClasses.from_bytes(data + b"\0", tokens)
    if tokens % 2:
        with pytest.raises(CorruptBlockError, match="classes"):
            TokenClasses.from_bytes(data[:-1] + bytes([data[-1] | 0x10]), tokens)


def test_runs_cover_the_tokens_in_the_order_of_coding() -> None:
    classes = TokenClasses(np.array([9, 8, 9, 7, 8, 8], dtype=np.uint8))
    assert classes.runs == [(24, 0, 1), (0, 1, 4), (-24, 4, 6)], "a higher class has a finer step"
    assert classes.order.tolist() == [3, 1, 4, 5, 0, 2]
    assert TokenClasses.alike(0).runs == [(0, 0, 0)]


def test_the_usual_class_is_at_the_mean_and_a_block_has_no_more_classes_than_it_can_pay() -> None:
    harm = np.linspace(-6, 6, 64)
    wide = TokenClasses.by(harm, 16)
    assert (np.diff(wide.of.astype(int)) >= 0).all() and abs(wide.of.astype(int).mean() - USUAL) < 0.1
    for most in (1, 2, 4, 9):
        assert len(TokenClasses.by(harm, most).runs) <= most
    assert most_classes(46_000, 8) >= 5 and most_classes(500, 8) == 1


def test_arranged_and_put_back_cancel() -> None:
    x = torch.randn(2, 3, 1, 5, 4)
    order = torch.stack([torch.randperm(5) for _ in range(2)])
    moved = arranged(x, order)
    assert torch.equal(moved[1, :, :, 0], x[1, :, :, order[1, 0]])
    put_back(moved, order)
    assert torch.equal(moved, x)


def test_calibration_learns_from_sizes_which_tokens_matter() -> None:
    moments = Moments(LAYOUT, plan(LAYOUT), 0)
    for i in range(6):
        moments.add(sample(i), rows_of(LAYOUT, sample(i), moments.groups)[0], None)
    weights, share = fit.harm_weights(moments, fit.sensitivities(moments))
    assert float(weights[:, 1].sum()) < -1, "small values mean much harm"
    assert share < 0.5
    assert fit.harm_weights(Moments(LAYOUT, plan(LAYOUT), 0), fit.sensitivities(moments)) == (None, 1.0)


@pytest.mark.parametrize("start", [0, 128])
def test_a_block_spends_its_bits_on_the_tokens_that_matter(start: int) -> None:
    profile = calibrate(LAYOUT, [sample(i) for i in range(6)])
    given = sample(50, start=start)
    codec = create("transform", LAYOUT, profile, ratio=4.0, layers=(8.0, 4.0))
    block = EncodedBlock.from_bytes(codec.encode(given.keys, given.values, start=start, tokens=given.tokens).to_bytes())
    marked = torch.arange(start, start + 128) % 8 == 5
    for fidelity in block.fidelities:
        keys, values = codec.decode(block, tokens=given.tokens, fidelity=fidelity)
        declared = block.distortion[fidelity]
        for x, y, told in ((given.keys, keys, declared.keys), (given.values, values, declared.values)):
            error = (x - y).square().mean((0, 1, 3))
            assert float(error.sum() / x.square().mean((0, 1, 3)).sum()) == pytest.approx(told, rel=0.15)
        error = (given.keys - keys).square().mean((0, 1, 3))
        assert float(error[marked].mean()) < 0.2 * float(error[~marked][1:].mean())
