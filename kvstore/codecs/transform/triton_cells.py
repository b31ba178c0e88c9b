"""What `kernels` does for the CPU around the entropy coder, in Triton: tables from the ladders, and values from the numbers.

Every choice of a table is integer arithmetic, alike on both; values may differ in their last bit. Arrays as in `streams.Streams`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _first_pass(kappa, steps, part, last, PASSES: tl.constexpr, ACTIVE: tl.constexpr):
    """In which pass coefficients of these kappa are coded for the first time."""
    f = kappa * 0
    for p in range(last):
        f += (kappa - tl.load(steps + part * PASSES + p) < ACTIVE).to(tl.int32)
    return f


@triton.jit(do_not_specialize=["parts"])
def tables_kernel(
    rows, passes, steps, parts_of, log_width, table_begin, tables, kappa, shape, zero, row_begin, parts,
    PASSES: tl.constexpr, ROWS: tl.constexpr, DITHERS: tl.constexpr, ACTIVE: tl.constexpr, CLASS_STEPS: tl.constexpr,
    CLASSES: tl.constexpr, SPAN: tl.constexpr, SHAPES: tl.constexpr, ZERO_TABLES: tl.constexpr, SLOPE_LOW: tl.constexpr,
    SLOPES: tl.constexpr,
):  # fmt: skip
    """`kernels.tables_of` for `ROWS` coefficients of one job and all passes; 0 <= kind <= pass."""
    job = tl.program_id(0)
    group, part = job // parts, job % parts
    last = tl.load(passes + part)
    count = tl.load(rows + job * PASSES + last - 1)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    first_row = tl.load(row_begin + group)
    k_flat = tl.load(kappa + first_row + r, mask=r < count, other=0)
    f_flat = _first_pass(k_flat, steps, part, last, PASSES, ACTIVE)
    s_flat = tl.load(shape + first_row + r, mask=r < count, other=0)
    k, f, s, row = k_flat[:, None, None], f_flat[:, None, None], s_flat[:, None, None], r[:, None, None]
    p, kind = tl.arange(0, PASSES)[None, :, None], tl.arange(0, PASSES)[None, None, :]
    there = (row < count) & (p < last) & (kind <= p)
    above = k - tl.load(steps + part * PASSES + p) - ACTIVE
    fresh = s * CLASSES + tl.minimum(above // CLASS_STEPS, CLASSES - 1)
    above_before = k - tl.load(steps + part * PASSES + tl.maximum(p - 1, 0)) - ACTIVE
    quiet = there & (kind == 0) & (f < p)
    stays = tl.load(zero + s * SPAN + tl.minimum(above, SPAN - 1), mask=quiet, other=0)
    stayed = tl.load(zero + s * SPAN + tl.minimum(above_before, SPAN - 1), mask=quiet, other=1)
    split_zero = SHAPES * CLASSES + tl.minimum(ZERO_TABLES * stays // stayed, ZERO_TABLES - 1)
    b = kind - 1
    cut = there & (b >= f) & (b < p)
    dither = (part * DITHERS + row % DITHERS) * (PASSES + 1)
    own = (b == f).to(tl.int32)
    n = tl.load(parts_of + ((dither + p) * PASSES + b) * 2 + own, mask=cut, other=0)
    narrowed = tl.load(log_width + ((dither + p + 1) * PASSES + b) * 2 + own, mask=cut, other=0)
    slope = tl.maximum(narrowed - k - SLOPE_LOW, 0) // CLASS_STEPS
    split_cell = SHAPES * CLASSES + ZERO_TABLES + (n - 2) * SLOPES + tl.minimum(slope, SLOPES - 1)
    table = tl.where(quiet, split_zero, tl.where((kind == 0) & (f == p), fresh, -1))
    table = tl.where(cut & (n > 1), split_cell, table)
    place = tl.load(table_begin + job) + row * (last * (last + 1) // 2) + p * (p + 1) // 2 + kind
    tl.store(tables + place, table.to(tl.int16), mask=there)


@triton.jit
def _cells(
    numbers, rows, steps_sizes, width, job, part, last, row, token, length, f, dither, DEAD: tl.constexpr, PASSES: tl.constexpr
):  # fmt: skip
    """`kernels.advance` through all passes: kinds, and lower edges of the cells."""
    kind, low = row * 0 + token * 0, (row * 0 + token * 0).to(tl.float32)
    plane = tl.load(rows + job * PASSES + last - 1) * length
    for p in range(last):
        inside = (row < tl.load(rows + job * PASSES + p)) & (token < length)
        q = tl.load(numbers + p * plane + row * length + token, mask=inside, other=0).to(tl.float32)
        b = tl.maximum(kind - 1, 0)
        place = ((dither + p + 1) * PASSES + b) * 2 + (b == f).to(tl.int32)
        move = q * tl.load(width + place, mask=inside & (kind > 0) & (q != 0), other=0.0)
        edge = (tl.abs(q) - 1 + DEAD) * tl.load(steps_sizes + part * PASSES + p)
        leaves = (kind == 0) & (q != 0)
        low = tl.where(leaves, tl.where(q < 0, -edge, edge), low + tl.where(low < 0, -move, move))
        kind = tl.where(leaves, p + 1, kind)
    return kind, low


@triton.jit(do_not_specialize=["group", "parts", "room"])
def values_kernel(
    numbers, number_begin, rows, passes, tokens, columns, steps, step_sizes, log_width, width, kappa, shape, centre, row_begin,
    out, group, parts, room,
    PASSES: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, DITHERS: tl.constexpr, ACTIVE: tl.constexpr, DEAD: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """`kernels.rebuild`: values of `ROWS` coefficients of one job into its columns of `out` [R, room]."""
    part = tl.program_id(0)
    job = group * parts + part
    last, length = tl.load(passes + part), tl.load(tokens + part)
    count = tl.load(rows + job * PASSES + last - 1)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    first_row, column, number0 = tl.load(row_begin + group), tl.load(columns + part), tl.load(number_begin + job)
    if tl.program_id(1) * ROWS < count:
        k = tl.load(kappa + first_row + row, mask=row < count, other=0)
        s = tl.load(shape + first_row + row, mask=row < count, other=0)
        f = tl.minimum(_first_pass(k, steps, part, last, PASSES, ACTIVE), last - 1)
        dither = (part * DITHERS + row % DITHERS) * (PASSES + 1)
        inner = (DEAD + 0.5) * tl.load(step_sizes + part * PASSES + f)
        for begin in range(0, length, TOKENS):
            token = begin + tl.arange(0, TOKENS)[None, :]
            kind, low = _cells(
                numbers + number0, rows, step_sizes, width, job, part, last, row, token, length, f, dither, DEAD, PASSES
            )  # fmt: skip
            inside, coded = (row < count) & (token < length), kind > 0
            b, size = tl.maximum(kind - 1, 0), tl.abs(low)
            which = tl.where(b == last - 1, tl.where(b > f, 2, tl.where(size < inner, 0, 1)), 1)
            place = ((dither + last) * PASSES + b) * 2 + (b == f).to(tl.int32)
            at = k - tl.load(log_width + place, mask=coded, other=0) - ACTIVE
            at = tl.minimum(tl.maximum(at, 0), SPAN - 1)
            middle = tl.load(centre + (s * 3 + which) * SPAN + at, mask=coded, other=0.0)
            size += middle * tl.load(width + place, mask=coded, other=0.0)
            value = tl.where(coded, tl.where(low < 0, -size, size), 0.0)
            tl.store(out + row.to(tl.int64) * room + column + token, value.to(out.dtype.element_ty), mask=inside)
