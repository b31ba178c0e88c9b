"""Each press drops what its paper says, against plain sums over a small cache."""

from __future__ import annotations

import pytest
import torch

from kvstore.layout import KVLayout
from services.engine.live import LiveKV, LivePool
from services.engine.presses import create_press

HEADS, GROUPS, TOKENS, DIM = 2, 3, 80, 8


@pytest.fixture
def kv():
    cache = LiveKV(LivePool(KVLayout(1, HEADS, DIM, torch.float32), 16, 16, torch.device("cpu")))
    cache.pool.k_LHPTD.normal_(generator=torch.Generator().manual_seed(1))
    cache.reserve(TOKENS)
    cache.length = TOKENS
    return cache


@pytest.fixture
def q_HGTD():
    return torch.randn(HEADS, GROUPS, TOKENS, DIM, generator=torch.Generator().manual_seed(2))


def attention(kv, q_HGTD) -> torch.Tensor:
    """Causal attention weights [H, G, T, T] of all queries."""
    logits = torch.einsum("hgtd,hsd->hgts", q_HGTD, kv.keys()[0]) * 0.5
    return logits.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), float("-inf")).softmax(-1)


def kept(name, kv, q_HGTD, budget=40) -> list[list[int]]:
    """Places that each head keeps, after the prompt came in two parts."""
    press = create_press(name, budget)
    for start, stop in ((0, 48), (48, TOKENS)):
        press.see(0, q_HGTD[:, :, start:stop], kv, stop, 0.5, None)
    return press.keep(kv, 2)[0].tolist()


def best(scores: torch.Tensor, count: int) -> set[int]:
    return set(scores.topk(count).indices.tolist())


def test_sliding_window_keeps_sinks_and_the_most_recent(kv, q_HGTD):
    assert kept("sliding_window", kv, q_HGTD) == [[*range(4), *range(TOKENS - 34, TOKENS)]] * HEADS


def test_knorm_keeps_the_smallest_keys_of_each_head(kv, q_HGTD):
    for head, places in enumerate(kept("knorm", kv, q_HGTD)):
        assert set(places) == best(-kv.keys()[0, head].norm(dim=-1), 38)


def test_h2o_keeps_the_recent_half_and_the_largest_sums_of_attention(kv, q_HGTD):
    sums = attention(kv, q_HGTD).sum((1, 2))
    for head, places in enumerate(kept("h2o", kv, q_HGTD)):
        assert set(places) == {*range(TOKENS - 20, TOKENS), *best(sums[head, : TOKENS - 20], 18)}


def test_tova_keeps_what_the_last_token_attends_to_in_all_heads_together(kv, q_HGTD):
    last = attention(kv, q_HGTD)[:, :, -1].mean((0, 1))
    assert [set(places) for places in kept("tova", kv, q_HGTD)] == [best(last, 38)] * HEADS


def test_snapkv_keeps_its_window_and_what_it_votes_for_with_neighbours(kv, q_HGTD):
    votes = attention(kv, q_HGTD)[:, :, -32:].mean((1, 2))
    pooled = torch.stack([votes[:, max(0, t - 2) : t + 3].mean(-1) for t in range(TOKENS)], -1)
    for head, places in enumerate(kept("snapkv", kv, q_HGTD)):
        assert set(places) == {*range(TOKENS - 20, TOKENS), *best(pooled[head, : TOKENS - 20], 18)}


def test_tokens_outside_a_layers_window_are_hidden_by_position(kv):
    kv.keep(torch.arange(0, TOKENS, 2).expand(1, HEADS, TOKENS // 2))
    kv.reserve(kv.length + 1)
    kv.length += 1
    kv.appended(TOKENS)
    hidden = kv.hidden(0, 1, kv.length, 10)
    assert [int(at) for at in kv.positions_LHT[0, 0, ~hidden[0, 0]]] == [72, 74, 76, 78, 80]
