"""The sampler: what each parameter keeps, and that a seed fixes the draws."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.engine.base import SamplingParams
from services.engine.sampler import Sampler, uniform

LOGITS = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()


def draws(count: int = 400, seed: int = 1, logits: torch.Tensor = LOGITS, **params) -> list[int]:
    sampler = Sampler(SamplingParams(1, **params), seed)
    return [sampler.choose(logits, step) for step in range(count)]


def test_temperature_zero_takes_the_largest():
    assert set(draws(5, temperature=0.0)) == {0}


def test_draws_follow_the_distribution():
    counts = Counter(draws(4000, temperature=1.0))
    for token, share in enumerate((0.4, 0.3, 0.2, 0.1)):
        assert abs(counts[token] / 4000 - share) < 0.04


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 1}, {0}), ({"top_k": 2}, {0, 1}), ({"top_k": 100}, {0, 1, 2, 3}), ({"top_p": 1e-9}, {0}), ({"top_p": 0.39}, {0}),
        ({"top_p": 0.41}, {0, 1}), ({"top_p": 0.95}, {0, 1, 2, 3}), ({"top_p": 0.5, "top_k": 3}, {0, 1}),
    ],
)  # fmt: skip
def test_truncation_keeps_the_right_tokens(params, kept):
    assert set(draws(temperature=1.0, **params)) == kept


def test_a_low_temperature_sharpens_and_a_high_one_flattens():
    cold, hot = (Counter(draws(temperature=t))[0] for t in (0.2, 50.0))
    assert cold > 300 > 150 > hot


def test_the_same_seed_gives_the_same_draws_and_another_others():
    assert draws(seed=7, temperature=1.0) == draws(seed=7, temperature=1.0) != draws(seed=8, temperature=1.0)


def test_a_draw_does_not_depend_on_those_before():
    sampler = Sampler(SamplingParams(1, temperature=1.0), 3)
    assert [sampler.choose(LOGITS, s) for s in reversed(range(50))][::-1] == draws(50, seed=3, temperature=1.0)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_uniform_numbers_are_in_range(seed, step):
    assert 0.0 <= uniform(seed, step) < 1.0


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=40), st.floats(0.01, 100), st.floats(1e-6, 1), st.integers(0, 50))
def test_any_logits_give_a_token(logits, temperature, top_p, top_k):
    params = SamplingParams(1, temperature=temperature, top_p=top_p, top_k=top_k)
    assert 0 <= Sampler(params, 0).choose(torch.tensor(logits), 0) < len(logits)
