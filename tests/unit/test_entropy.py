"""The rANS coder against its plain-Python oracle, and against bytes that it never wrote."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codecs.entropy import rans, reference
from kvstore.codecs.entropy.book import MAX_SYMBOLS, TOTAL, Book, frequencies
from kvstore.errors import InvalidInputError


def book() -> Book:
    """Four tables: narrow with escape, wide with plain bits and escape, binary without escape, one certain symbol."""
    probability = np.zeros((4, MAX_SYMBOLS))
    probability[0, :5], probability[0, 5] = [1, 8, 80, 8, 1], 0.5
    probability[1, :33] = np.exp(-np.abs(np.arange(33) - 16) / 5)
    probability[2, :2] = 0.7, 0.3
    probability[3, 0] = 1
    freq = np.stack([frequencies(p) for p in probability])
    return Book(freq, np.array([-2, -64, 0, 0]), np.array([0, 2, 0, 0]), np.array([5, 32, -1, -1]))


def matrix(seed: int, rows: int, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    tables = rng.integers(-1, 4, (rows, 2)).astype(np.int16)
    contexts = rng.integers(0, 2, (rows, tokens)).astype(np.uint8)
    used = np.take_along_axis(tables, contexts.astype(int), 1)
    wide = (rng.standard_t(2, (rows, tokens)) * 40).clip(-32768, 32767)
    narrow = (rng.standard_t(2, (rows, tokens))).clip(-32768, 32767)
    numbers = np.select([used == 0, used == 1, used == 2], [narrow, wide, rng.integers(0, 2, (rows, tokens))], 0)
    return numbers.astype(np.int16), contexts, tables


def encode(numbers: np.ndarray, contexts: np.ndarray, tables: np.ndarray, tables_of: Book) -> np.ndarray:
    out = np.empty(rans.max_words(numbers.size), dtype=np.uint16)
    return out[rans.encode(numbers, contexts, tables, out, *tables_of.arrays) :]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 9), st.integers(1, 40))
def test_numba_and_oracle_write_and_read_the_same_words(seed: int, rows: int, tokens: int) -> None:
    tables_of = book()
    numbers, contexts, tables = matrix(seed, rows, tokens)
    words = encode(numbers, contexts, tables, tables_of)
    assert words.tolist() == reference.encode(numbers, contexts, tables, tables_of)
    decoded = np.full_like(numbers, 99)
    assert rans.decode(words, contexts, tables, decoded, *tables_of.arrays)
    assert (decoded == numbers).all()
    assert (reference.decode(words.tolist(), contexts, tables, numbers.shape, tables_of) == numbers).all()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.data())
def test_a_damaged_stream_is_noticed_by_both_or_by_none(seed: int, data: st.DataObject) -> None:
    tables_of = book()
    numbers, contexts, tables = matrix(seed, 6, 30)
    words = encode(numbers, contexts, tables, tables_of).copy()
    at = data.draw(st.integers(0, len(words) - 1))
    words[at] ^= data.draw(st.integers(1, 65535))
    words = words[: data.draw(st.integers(0, len(words)))]
    decoded = np.zeros_like(numbers)
    good = rans.decode(words, contexts, tables, decoded, *tables_of.arrays)
    try:
        oracle = reference.decode(words.tolist(), contexts, tables, numbers.shape, tables_of)
    except ValueError:
        assert not good
    else:
        assert good and (oracle == decoded).all()


def test_the_cost_table_predicts_the_stream_within_two_per_cent() -> None:
    tables_of = book()
    rng = np.random.default_rng(0)
    numbers = rng.choice([-2, -1, 0, 1, 2], (300, 64), p=np.array([1, 8, 80, 8, 1]) / 98).astype(np.int16)
    zero = np.zeros(numbers.shape, dtype=np.uint8)
    words = encode(numbers, zero, np.zeros((300, 1), dtype=np.int16), tables_of)
    predicted = tables_of.cost[0, numbers + 2].sum() / 16 + rans.STATE_WORDS
    assert abs(len(words) - predicted) < 0.02 * predicted


def test_frequencies_sum_to_the_total_and_keep_every_possible_symbol() -> None:
    freq = frequencies(np.array([1.0, 1e-12, 0.0, 1e-12]))
    assert freq.sum() == TOTAL and freq[1] == freq[3] == 1 and freq[2] == 0


def test_malformed_tables_are_refused() -> None:
    good = book()
    bad = good.freq.copy()
    bad[0, 0] += 1
    with pytest.raises(InvalidInputError, match="sum to 4096"):
        Book(bad, good.first, good.shift, good.escape)
    with pytest.raises(InvalidInputError, match="impossible"):
        Book(good.freq, good.first, good.shift + 20, good.escape)
