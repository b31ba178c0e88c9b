"""Triton kernels over the pages of live caches. They run on the CPU too, under ``TRITON_INTERPRET=1``; the tests do that.

What a kernel is to do comes as items, each of one request: its first row in the flat batch, how many rows it has (0 for an item that is
not in use), the place of the first in its cache, and its table of pages. A row's numbers depend on its own query and cache alone: blocks
of keys come in the order of places, at multiples of their size, and keys that a row must not see add exactly nothing to it.

Online softmax: Milakov and Gimelshein, https://arxiv.org/abs/1805.02867; over blocks of keys: FlashAttention,
https://arxiv.org/abs/2205.14135; parts of the keys apart and merged: Flash-Decoding (Dao et al., 2023); pages: PagedAttention,
https://arxiv.org/abs/2309.06180.

Shape suffixes: N row of the flat batch, Q query head, H KV head, G query heads a KV head, D head dim, S slot (page · page size + place).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_rows(
    key, value, k_cache, v_cache, slots, head_stride, k_head, k_row, v_head, v_row,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """K and V [H, N, D] into the caches [H, S, D] of one layer; program (n, h). Rows with a negative slot are padding."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row)
    d = tl.arange(0, BLOCK_D)
    live = (d < DIM) & (slot + 0 * d >= 0)
    to = head * head_stride + slot * DIM + d
    tl.store(k_cache + to, tl.load(key + head * k_head + row * k_row + d, mask=live, other=0.0), mask=live)
    tl.store(v_cache + to, tl.load(value + head * v_head + row * v_row + d, mask=live, other=0.0), mask=live)


@triton.jit
def _first_key(place, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Begin of the block with the first key that the query at `place` sees."""
    first = place * 0
    if WINDOW:
        first = tl.maximum(place - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    return first


@triton.jit
def _walk(
    q, at, begin, stop, k_cache, v_cache, table, scale_log2,
    DIM: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Queries q [BLOCK_M, BLOCK_D] at places `at` over the keys from `begin` to `stop`.

    Gives the largest scores, in powers of 2, the sums, and the values weighted and not yet divided by the sums, all float32.
    """
    d = tl.arange(0, BLOCK_D)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(begin, stop, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        inside = n < stop
        page = tl.load(table + n // PAGE, mask=inside, other=0)
        offset = (page * PAGE + n % PAGE)[:, None] * DIM + d[None, :]
        there = inside[:, None] & (d < DIM)[None, :]
        k = tl.load(k_cache + offset, mask=there, other=0.0)
        v = tl.load(v_cache + offset, mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        seen = inside[None, :] & (n[None, :] <= at[:, None])
        if WINDOW:
            seen = seen & (n[None, :] > at[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        shrunk = tl.exp2(top - base)
        total = total * shrunk + tl.sum(weights, 1)
        acc = acc * shrunk[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = higher
    return top, total, acc


@triton.jit
def attend_tiles(
    query, out, k_cache, v_cache, begins, counts, starts, tables, table_stride, head_stride, q_head, q_row, out_row, scale_log2,
    GROUPS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Queries [Q, N, D] of prompt tiles to out [N, Q, D]; program (block of packed rows, h, item).

    The G query heads of a KV head are further rows beside each other: packed row m is query m // G of the item, head m % G.
    """
    item, head = tl.program_id(2), tl.program_id(1).to(tl.int64)
    count, start = tl.load(counts + item).to(tl.int32), tl.load(starts + item).to(tl.int32)
    packed = tl.program_id(0) * BLOCK_M
    m = packed + tl.arange(0, BLOCK_M)
    t, q_of_head = m // GROUPS, head * GROUPS + m % GROUPS
    row = tl.load(begins + item) + t
    d = tl.arange(0, BLOCK_D)
    live = (t < count)[:, None] & (d < DIM)[None, :]
    q = tl.load(query + (q_of_head * q_head + row * q_row)[:, None] + d[None, :], mask=live, other=0.0)
    oldest = packed // GROUPS
    stop = tl.where(oldest < count, start + tl.minimum(count, (packed + BLOCK_M - 1) // GROUPS + 1), 0)
    begin = _first_key(start + oldest, WINDOW, BLOCK_N)
    _, total, acc = _walk(
        q, start + t, begin, stop, k_cache + head * head_stride, v_cache + head * head_stride, tables + item * table_stride, scale_log2,
        DIM, PAGE, WINDOW, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + (row * out_row + q_of_head * DIM)[:, None] + d[None, :], result, mask=live)


@triton.jit
def attend_parts(
    query, parts, tops, totals, k_cache, v_cache, counts, starts, tables, table_stride, head_stride, q_head, q_row, scale_log2,
    GROUPS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The newest token of each request over its cache in parts of PART keys; program (part, h, item). Item n has row n.

    Writes parts [items, Q, parts, D], tops and totals [items, Q, parts], float32; those of parts without keys are left as they are.
    """
    part, head, item = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    count, start = tl.load(counts + item).to(tl.int32), tl.load(starts + item).to(tl.int32)
    g = tl.arange(0, BLOCK_M)
    q_of_head = head * GROUPS + g
    d = tl.arange(0, BLOCK_D)
    begin = tl.maximum(_first_key(start, WINDOW, BLOCK_N), part * PART)
    stop = tl.where(count > 0, tl.minimum(start + 1, (part + 1) * PART), 0)
    live = (g < GROUPS) & (begin + 0 * g < stop)
    wide = live[:, None] & (d < DIM)[None, :]
    q = tl.load(query + (q_of_head * q_head + item * q_row)[:, None] + d[None, :], mask=wide, other=0.0)
    top, total, acc = _walk(
        q, start + g * 0, begin, stop, k_cache + head * head_stride, v_cache + head * head_stride, tables + item * table_stride, scale_log2,
        DIM, PAGE, WINDOW, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    to = (item * tl.num_programs(1) * GROUPS + q_of_head) * tl.num_programs(0) + part
    tl.store(tops + to, top, mask=live)
    tl.store(totals + to, total, mask=live)
    tl.store(parts + to[:, None] * DIM + d[None, :], acc, mask=wide)


@triton.jit
def merge_parts(
    parts, tops, totals, out, counts, starts, part_count, out_row,
    DIM: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """What `attend_parts` left, to out [N, Q, D]; program (q, item). Parts come in order, BLOCK_P at a time.

    Item n has row n, and 0 is written for one that is not in use.
    """
    head, item = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    count, start = tl.load(counts + item).to(tl.int32), tl.load(starts + item).to(tl.int32)
    d = tl.arange(0, BLOCK_D)
    base = (item * tl.num_programs(0) + head) * part_count
    first = _first_key(start, WINDOW, BLOCK_N) // PART // BLOCK_P * BLOCK_P
    stop = tl.where(count > 0, start // PART + 1, 0)
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for at in range(first, stop, BLOCK_P):
        p = at + tl.arange(0, BLOCK_P)
        there = (p >= _first_key(start, WINDOW, BLOCK_N) // PART) & (p < stop)
        tops_here = tl.load(tops + base + p, mask=there, other=float("-inf"))
        higher = tl.maximum(top, tl.max(tops_here, 0))
        weights, shrunk = tl.exp2(tops_here - higher), tl.exp2(top - higher)
        total = total * shrunk + tl.sum(weights * tl.load(totals + base + p, mask=there, other=0.0), 0)
        wide = there[:, None] & (d < DIM)[None, :]
        part = tl.load(parts + (base + p)[:, None] * DIM + d[None, :], mask=wide, other=0.0)
        acc = acc * shrunk + tl.sum(part * weights[:, None], 0)
        top = higher
    tl.store(out + item * out_row + head * DIM + d, acc / tl.where(total == 0.0, 1.0, total), mask=d < DIM)
