"""The Triton kernels, interpreted on the CPU, against the numba coder: the same words, the same numbers, the same refusals."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from kvstore.settings import environment

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

#: Runs in a process of its own: Triton decides on import whether it interprets.
PROGRAM = """
import numpy as np, torch
from tests.unit.test_entropy import book, encode, matrix
from kvstore.codecs.entropy import rans
from kvstore.codecs.entropy.triton_rans import TritonCoder

tables_of = book()
cases = [matrix(seed, rows, 13) for seed, rows in ((0, 5), (1, 1), (2, 0), (3, 9))]
words = [encode(*case, tables_of) for case in cases]
coder = TritonCoder(tables_of, "cpu")
numbers, contexts, tables = ([torch.from_numpy(case[i]) for case in cases] for i in range(3))
made = coder.encode(numbers, contexts, tables)
assert all((m.numpy() == w).all() and len(m) == len(w) for m, w in zip(made, words))
decoded, intact = coder.decode(made, contexts, tables)
assert all(intact) and all(torch.equal(d, n) for d, n in zip(decoded, numbers))

rng = np.random.default_rng(0)
for _ in range(20):
    damaged = [w.copy() for w in words]
    for w in damaged:
        w[rng.integers(len(w))] ^= rng.integers(1, 65536)
    damaged = [w[: rng.integers(len(w)) if rng.random() < 0.5 else len(w)] for w in damaged]
    decoded, intact = coder.decode([torch.from_numpy(w) for w in damaged], contexts, tables)
    for w, case, got, ok in zip(damaged, cases, decoded, intact):
        out = np.zeros_like(case[0])
        good = rans.decode(w, case[1], case[2], out, *tables_of.arrays)
        assert good == ok and (not good or (out == got.numpy()).all())
print("equal")
"""


def test_interpreted_kernels_equal_the_cpu_coder() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment(TRITON_INTERPRET="1"), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
