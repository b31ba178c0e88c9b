"""Native attention of prompt tiles against torch: the same numbers within rounding, and tiles that keep their bits in any company."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from kvstore.layout import KVLayout
from services.engine.attention import Tile
from services.engine.cpu.prompts import Prompts, can_attend_prompts
from services.engine.live import LiveKV, LivePool

HEADS, SCALE, LAYER = 2, 0.3, 1


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        yield


def cache(tokens, size, dim):
    """An empty cache whose pages lie anyhow, in memory that holds no numbers."""
    pool = LivePool(KVLayout(2, HEADS, dim, torch.float32), pages=-(-tokens // size) + 2, block_tokens=size, device=torch.device("cpu"))
    pool.k_LHPTD.fill_(float("nan"))
    pool.v_LHPTD.fill_(float("nan"))
    kv = LiveKV(pool)
    kv.reserve(tokens)
    kv.page_ids.reverse()
    return kv


def tiles_of(kv, tokens, size, row=0):
    return [Tile(kv, row + at, at, min(size, tokens - at), None) for at in range(0, tokens, size)]


def rows_of(tokens, groups, dim):
    """Queries, keys and values as models give them: [1, heads, N, D], a token's heads side by side."""
    return tuple(torch.randn(1, tokens, heads, dim).transpose(1, 2) for heads in (HEADS * groups, HEADS, HEADS))


def wanted(query, key, value, groups, window):
    at = torch.arange(query.shape[2])
    mask = at <= at[:, None]
    if window:
        mask &= at > at[:, None] - window
    key, value = (x.double().repeat_interleave(groups, 1) for x in (key, value))
    return functional.scaled_dot_product_attention(query.double(), key, value, attn_mask=mask, scale=SCALE)[0].transpose(0, 1)


@pytest.mark.parametrize(("tokens", "size"), [(1, 64), (3, 4), (64, 64), (131, 16), (500, 64)])
@pytest.mark.parametrize("window", [None, 1, 40, 64])
@pytest.mark.parametrize(("dim", "groups"), [(12, 1), (64, 3), (32, 9)])
def test_it_is_that_of_torch_however_a_prompt_is_cut(tokens, size, window, dim, groups):
    query, key, value = rows_of(tokens, groups, dim)
    together, apart = cache(tokens, size, dim), cache(tokens, size, dim)
    out = Prompts(tiles_of(together, tokens, size)).attend(LAYER, query, key, value, SCALE, window)
    torch.testing.assert_close(out, wanted(query, key, value, groups, window).float(), rtol=1e-5, atol=1e-5)
    for kept, given in zip(together.layer(LAYER, tokens), (key, value), strict=True):
        assert torch.equal(kept, given[0])
    for at in range(0, tokens, size):
        rows = slice(at, min(at + size, tokens))
        alone = Prompts([Tile(apart, 0, at, rows.stop - at, None)])
        assert torch.equal(alone.attend(LAYER, query[:, :, rows], key[:, :, rows], value[:, :, rows], SCALE, window), out[rows])


def test_prompts_do_not_see_one_another_and_padding_is_zero():
    size, dim, groups, lengths = 16, 32, 2, (40, 16)
    query, key, value = rows_of(64, groups, dim)
    pool = LivePool(KVLayout(2, HEADS, dim, torch.float32), pages=8, block_tokens=size, device=torch.device("cpu"))
    caches = [LiveKV(pool) for _ in lengths]
    for kv, length in zip(caches, lengths, strict=True):
        kv.reserve(length)
    tiles, row = [], 0
    for kv, length in zip(caches, lengths, strict=True):
        tiles += tiles_of(kv, length, size, row)
        row += length
    out = Prompts(tiles).attend(LAYER, query, key, value, SCALE, None)
    row = 0
    for length in lengths:
        rows = slice(row, row + length)
        want = wanted(*(x[:, :, rows] for x in (query, key, value)), groups, None)
        torch.testing.assert_close(out[rows], want.float(), rtol=1e-5, atol=1e-5)
        row += length
    assert not out[row:].any()


def test_large_logits_and_what_nobody_may_see_leave_no_trace():
    """A query's numbers are the same whatever comes behind it in its page, even where they begin with zeros."""
    size, dim = 16, 8
    query, key, value = rows_of(size, 1, dim)
    value[:, :, 0] = 0
    key *= 300
    first = Prompts(tiles_of(cache(size, size, dim), size, size)).attend(LAYER, query, key, value, SCALE, None)
    assert first.isfinite().all() and not first[0].any()
    key[:, :, 5:], value[:, :, 5:] = 1e4, 1e9
    again = Prompts(tiles_of(cache(size, size, dim), size, size)).attend(LAYER, query, key, value, SCALE, None)
    assert torch.equal(first[:5], again[:5])


def test_what_the_code_was_not_made_for_is_left_to_torch(monkeypatch):
    def can(dtype, dim, size):
        return can_attend_prompts(LivePool(KVLayout(1, 1, dim, dtype), 1, size, torch.device("cpu")))

    monkeypatch.setattr("services.engine.cpu.prompts.beats_library", lambda: True)
    assert can(torch.float32, 64, 16)
    assert not can(torch.bfloat16, 64, 16) and not can(torch.float32, 6, 16) and not can(torch.float32, 64, 6)
    monkeypatch.setattr("services.engine.cpu.prompts.beats_library", lambda: False)
    assert not can(torch.float32, 64, 16)
