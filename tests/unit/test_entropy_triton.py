"""The Triton kernels, interpreted on the CPU, against the numba coder: the same words, the same numbers, the same refusals."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from kvstore.settings import environment

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

#: Runs in a process of its own: Triton decides on import whether it interprets.
ENCODING = """
import torch
from tests.unit.test_entropy import book, encode, matrix
from kvstore.codecs.entropy.triton_rans import TritonCoder

tables_of = book()
cases = [matrix(seed, rows, 13) for seed, rows in ((0, 5), (1, 1), (2, 0), (3, 9))]
words = [encode(*case, tables_of) for case in cases]
numbers, contexts, tables = ([torch.from_numpy(case[i]) for case in cases] for i in range(3))
made = TritonCoder(tables_of, "cpu").encode(numbers, contexts, tables)
assert all((m.numpy() == w).all() and len(m) == len(w) for m, w in zip(made, words))
print("equal")
"""
#: Matrices of some passes, each of which uses the tables that the kinds of the one before name.
DECODING = """
import numpy as np, torch
from tests.unit.test_entropy import book, encode
from kvstore.codecs.entropy import rans
from kvstore.codecs.entropy.book import MAX_SYMBOLS
from kvstore.codecs.entropy.triton_rans import decode_kernel

tables_of, rng, PASSES = book(), np.random.default_rng(5), 4

def job(tokens, rows):
    tables, numbers, words = np.full((rows[-1], PASSES, PASSES), -1, np.int16), [], []
    kinds = np.zeros((rows[-1], tokens), np.uint8)
    for p, count in enumerate(rows):
        tables[:count, p, : p + 1] = rng.integers(-1, 4, (count, p + 1))
        used = np.take_along_axis(tables[:count, p], kinds[:count].astype(int), 1)
        wide, narrow = ((rng.standard_t(2, used.shape) * s).clip(-32768, 32767) for s in (40, 1))
        q = np.select([used == 0, used == 1, used == 2], [narrow, wide, rng.integers(0, 2, used.shape)], 0).astype(np.int16)
        words.append(encode(q, kinds[:count], tables[:count, p], tables_of))
        numbers.append(q)
        kinds[:count][(kinds[:count] == 0) & (q != 0)] = p + 1
    return tokens, rows, tables, numbers, words

def expected(tokens, rows, tables, numbers, words):
    kinds, out = np.zeros((rows[-1], tokens), np.uint8), np.zeros((len(rows), rows[-1], tokens), np.int16)
    for p, count in enumerate(rows):
        if not rans.decode(words[p], kinds[:count], tables[:count, p].copy(), out[p, :count], *tables_of.arrays):
            return None
        kinds[:count][(kinds[:count] == 0) & (out[p, :count] != 0)] = p + 1
    return out

def decoded(jobs):
    each = range(len(jobs))
    last = [len(j[1]) for j in jobs]
    begin, count, rows = (np.zeros((len(jobs), PASSES), dtype) for dtype in (np.int64, np.int32, np.int32))
    flat = np.concatenate([w for j in jobs for w in j[4]] + [np.zeros(1, np.uint16)])
    at = 0
    for i, j in enumerate(jobs):
        for p, w in enumerate(j[4]):
            begin[i, p], count[i, p], rows[i, p], at = at, len(w), j[1][p], at + len(w)
    low = [np.concatenate([j[2][:, p, : p + 1] for p in range(n)], 1) for j, n in zip(jobs, last)]
    table_begin = np.cumsum([0] + [t.size for t in low])
    sizes = [n * j[1][-1] * j[0] for j, n in zip(jobs, last)]
    number_begin = np.cumsum([0] + sizes)
    numbers, intact = torch.zeros(int(number_begin[-1]) + 1, dtype=torch.int16), torch.zeros(len(jobs), dtype=torch.int8)
    given = (flat, begin, count, rows, np.array(last, np.int32), np.array([j[0] for j in jobs], np.int32))
    tables = np.concatenate([t.reshape(-1) for t in low] + [np.zeros(1, np.int16)])
    decode_kernel[(len(jobs),)](
        *map(torch.from_numpy, given), torch.from_numpy(tables), torch.from_numpy(table_begin), numbers, torch.from_numpy(number_begin),
        intact, torch.from_numpy(tables_of.slots), torch.from_numpy(tables_of.entries.view(np.int64)), len(jobs),
        PASSES=PASSES, LANES=rans.LANES, LOW=rans.LOW, BITS=rans.PROBABILITY_BITS, SYMBOLS=MAX_SYMBOLS,
    )
    return [numbers[a : a + s].view(n, j[1][-1], j[0]).numpy() for a, s, n, j in zip(number_begin, sizes, last, jobs)], intact

jobs = [job(*shape) for shape in ((13, (2, 5, 5)), (1, (1,)), (3, (0, 0)), (5, (0, 4, 9, 9)), (8, (6, 7)))]
got, intact = decoded(jobs)
assert intact.all()
for (tokens, rows, _, numbers, _), found in zip(jobs, got):
    for p, count in enumerate(rows):
        assert (found[p, :count] == numbers[p]).all() and not found[p, count:].any()
for _ in range(6):
    damaged = []
    for *rest, words in jobs:
        words = [w.copy() for w in words]
        p = int(rng.integers(len(words)))
        words[p][rng.integers(len(words[p]))] ^= rng.integers(1, 65536)
        words[p] = words[p][: rng.integers(len(words[p])) if rng.random() < 0.5 else len(words[p])]
        damaged.append((*rest, words))
    got, intact = decoded(damaged)
    for j, found, ok in zip(damaged, got, intact):
        want = expected(*j)
        assert (want is not None) == bool(ok) and (want is None or (want == found).all())
print("equal")
"""


@pytest.mark.parametrize("program", [ENCODING, DECODING], ids=["encoding", "decoding"])
def test_interpreted_kernels_equal_the_cpu_coder(program) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(TRITON_INTERPRET="1"), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
