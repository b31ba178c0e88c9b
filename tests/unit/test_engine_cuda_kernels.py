"""Attention over pages by the Triton kernels, interpreted on the CPU, against plain torch over the same caches."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from kvstore.settings import environment

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

#: Run in processes of their own: Triton decides on import whether it interprets. Interpreted, it has no products of bfloat16.
COMMON = """
import torch
DEVICE = torch.device("NAME")
torch.set_default_device(DEVICE)
from kvstore.layout import KVLayout
from services.engine.cuda.batch import Batch
from services.engine.cuda.frame import Frame, Shape, Span
from services.engine.live import LiveKV, LivePool

def cache(pool, length, among):
    kv = LiveKV(pool)
    pages = -(-length // pool.block_tokens)
    kv.page_ids, kv.length = among[:pages], length
    del among[:pages]
    return kv

def wanted(before, kv, layer, start, q, k, v, window):
    # [T, Q, D] in float64; `before` are the pool's tensors as they were.
    stop = start + q.shape[1]
    pages = torch.tensor(kv.page_ids)
    keys, values = (x[layer][:, pages].flatten(1, 2)[:, :stop].double() for x in before)
    keys[:, start:], values[:, start:] = k.double(), v.double()
    groups = q.shape[0] // keys.shape[0]
    keys, values = (x.repeat_interleave(groups, 0) for x in (keys, values))
    scores = q.double() @ keys.transpose(1, 2) * 0.3
    n, at = torch.arange(stop)[None], torch.arange(start, stop)[:, None]
    hidden = n > at
    if window:
        hidden = hidden | (n <= at - window)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values).transpose(0, 1)

def check(tokens, rows, spans, heads, queries, dim, page, dtype, window=None, pages=16, tolerance=None):
    # `spans` are (row, start, count), each of a request of its own; rows of no span are padding.
    layout = KVLayout(layers=2, kv_heads=heads, head_dim=dim, dtype=dtype)
    pool = LivePool(layout, 64, page, DEVICE)
    for x in (pool.k_LHPTD, pool.v_LHPTD):
        x.copy_(torch.randn(x.shape))
        x[:, :, :4] = float("nan")  # nobody's pages
    among = (torch.randperm(60) + 4).tolist()
    spans = [Span(cache(pool, start + count, among), row, start, count) for row, start, count in spans]
    for kv in (span.kv for span in spans):  # what is behind a request's last token is anything
        used = kv.length % page or page
        pool.k_LHPTD[:, :, kv.page_ids[-1], used:] = pool.v_LHPTD[:, :, kv.page_ids[-1], used:] = float("nan")
    before = pool.k_LHPTD.clone(), pool.v_LHPTD.clone()
    frame = Frame(Shape(tokens, rows, max(len(spans), rows if tokens else rows // page), 8, pages), page, pool.device)
    frame.fill([0] * rows, [0] * rows, [0] * 8, spans)
    # Laid out as projections give them: the rows outermost.
    q, k, v = (torch.randn(rows, n, dim).to(dtype).transpose(0, 1)[None] for n in (queries, heads, heads))
    out = Batch(pool, frame).attend(1, q, k, v, 0.3, window)
    padding = torch.ones(rows, dtype=torch.bool)
    expected = [x.clone() for x in before]
    for span in spans:
        mine = slice(span.row, span.row + span.count)
        padding[mine] = False
        want = wanted(before, span.kv, 1, span.start, q[0, :, mine], k[0, :, mine], v[0, :, mine], window)
        error = (out[mine].double() - want).abs().max()
        assert error < (tolerance or (2e-5 if dtype == torch.float32 else 0.03)), (error, span.start, span.count)
        for x, new in zip(expected, (k, v)):
            for i in range(span.count):
                place = span.start + i
                x[1, :, span.kv.page_ids[place // page], place % page] = new[0, :, span.row + i]
    assert not out[padding].any()
    for x, y in zip((pool.k_LHPTD, pool.v_LHPTD), expected):
        assert torch.equal(x.nan_to_num(7e7), y.nan_to_num(7e7)), "K and V are written where they belong, and nowhere else"
    return out

torch.manual_seed(0)
"""

TILES = """
for dtype in (torch.float32, torch.float16):
    check(False, 64, [(0, 32, 16), (16, 0, 16), (32, 16, 5)], 2, 6, 8, 16, dtype)
check(False, 32, [(0, 48, 16), (16, 160, 16)], 2, 8, 24, 16, torch.float32, window=20)
check(False, 32, [(0, 48, 16), (16, 160, 11)], 1, 24, 80, 16, torch.float32, window=100)
check(False, 64, [(0, 128, 64)], 3, 9, 64, 64, torch.float16)
check(False, 24, [(0, 36, 12), (12, 12, 12)], 2, 2, 200, 12, torch.float32)
check(False, 16, [(0, 0, 1)], 2, 4, 16, 16, torch.float32)
"""

TOKENS = """
for dtype in (torch.float32, torch.float16):
    check(True, 8, [(0, 33, 1), (1, 0, 1), (2, 15, 1), (3, 16, 1)], 2, 6, 8, 16, dtype)
long = [(0, 1300, 1), (1, 511, 1), (2, 512, 1), (3, 70, 1)]
check(True, 8, long, 2, 4, 24, 128, torch.float32)
check(True, 8, long, 2, 4, 16, 128, torch.float32, window=600)
check(True, 8, long, 2, 4, 16, 128, torch.float32, window=40)
check(True, 4, [(0, 100, 1)], 1, 20, 72, 16, torch.float32)
"""

ALONE = """
# The bits of a request do not depend on company, on places of rows, on how many rows a tile has, or on the size of the tables.
def run(tokens, rows, spans, pages, window):
    layout = KVLayout(layers=1, kv_heads=2, head_dim=16, dtype=torch.float32)
    pool = LivePool(layout, 64, 16, DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(1)
    for x in (pool.k_LHPTD, pool.v_LHPTD):
        x.copy_(torch.randn(x.shape, generator=generator))
    stored = torch.randn(3, 16, 8, 16, generator=generator)
    made = []
    for row, number, start, count in spans:
        kv = LiveKV(pool)
        kv.page_ids, kv.length = list(range(20 * number, 20 * number + 20)), start + count
        made.append(Span(kv, row, start, count))
    frame = Frame(Shape(tokens, rows, rows if tokens else rows // 16, 8, pages), 16, pool.device)
    frame.fill([0] * rows, [0] * rows, [0] * 8, made)
    x = torch.randn(rows, 8, 16)
    for row, number, start, count in spans:
        x[row : row + count] = stored[number, :count]
    x = x.transpose(0, 1)[None]
    out = Batch(pool, frame).attend(0, x[:, :4], x[:, 4:6], x[:, 6:], 0.25, window)
    return {number: out[row : row + count] for row, number, _, count in spans}

for window in (None, 50):
    together = run(False, 64, [(0, 2, 48, 16), (16, 0, 96, 16), (32, 1, 0, 16)], 32, window)
    for number, start in ((0, 96), (1, 0), (2, 48)):
        assert torch.equal(run(False, 64, [(0, number, start, 16)], 48, window)[number], together[number])
        assert torch.equal(run(False, 16, [(0, number, start, 7)], 32, window)[number], together[number][:7])
    together = run(True, 8, [(0, 2, 300, 1), (1, 0, 17, 1), (2, 1, 0, 1)], 32, window)
    for number, start in ((0, 17), (1, 0), (2, 300)):
        assert torch.equal(run(True, 8, [(0, number, start, 1)], 256, window)[number], together[number])
"""

NORMS = """
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from services.engine.cuda.norms import fitting

for kind, ones in ((LlamaRMSNorm, 1), (Gemma3RMSNorm, 0)):
    for dtype in (torch.float32, torch.bfloat16):
        norm = kind(72, eps=1e-3).to(dtype).requires_grad_(False)
        norm.weight.copy_(ones + torch.randn(72) / 4)
        ours, x = fitting(norm), torch.randn(2, 5, 3, 72).to(dtype)
        assert ours.rounds == ones and ours(x).dtype == dtype
        near = torch.finfo(dtype).eps
        torch.testing.assert_close(ours(x), norm(x), rtol=2 * near, atol=near)
        assert torch.equal(ours(x[:1, 2:4]), ours(x)[:1, 2:4])
assert fitting(torch.nn.LayerNorm(8)) is None
"""


def run(program: str, device: str, **variables: str) -> None:
    """`program` after `COMMON`, in a process of its own."""
    text = COMMON.replace("NAME", device) + program + "print('equal')"
    done = subprocess.run(
        [sys.executable, "-c", text], env=environment(**variables), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


@pytest.mark.parametrize("program", [TILES, TOKENS, ALONE, NORMS], ids=["tiles", "tokens", "alone", "norms"])
def test_interpreted_kernels_do_as_torch_does(program: str) -> None:
    run(program, "cpu", TRITON_INTERPRET="1")
