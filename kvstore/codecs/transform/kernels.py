"""The quantizer's inner loops, compiled by numba: numbers from coefficients, their price, and coefficients from numbers.

All work on one block. Legend: R coefficients (rows) of a group by falling sigma, T tokens, P passes. `kinds` [R, T] says in which pass a
value left the dead zone, plus one; 0 while it is inside. `lows` [R, T] is the signed lower edge of its cell.

numba's cache looks at the file of a kernel alone: change this file too when a constant of `models` changes.
"""

from __future__ import annotations

import numba
import numpy as np

from .ladder import DITHER
from .models import ACTIVE, CLASS_STEPS, CLASSES, DEAD_ZONE, OCTAVE, PART_LOG, SLOPE_LOW, SLOPES, SPAN, ZERO_TABLES

_jit = numba.njit(nogil=True, cache=True, boundscheck=False)
_DEAD = np.float32(DEAD_ZONE)
_LIMIT = 32767
DITHERS = len(DITHER)


@_jit
def active(kappa, m):  # type: ignore[no-untyped-def]
    """How many of the coefficients (kappa [R] falling) are coded at step index `m`."""
    low, high = 0, kappa.size
    while low < high:
        middle = (low + high) // 2
        if kappa[middle] - m >= ACTIVE:
            low = middle + 1
        else:
            high = middle
    return low


@_jit
def _first_pass(kappa, steps):  # type: ignore[no-untyped-def]
    f = 0
    while kappa - steps[f] < ACTIVE:
        f += 1
    return f


@_jit
def tables_of(kappa, shape, count, p, steps, parts, log_width, zero):  # type: ignore[no-untyped-def]
    """Table of each coefficient (of the first `count`) for each kind of value in pass `p`: int16 [count, p + 1], -1 for none."""
    out = np.full((count, p + 1), -1, dtype=np.int16)
    zero_base = zero.shape[0] * CLASSES
    cell_base = zero_base + ZERO_TABLES
    for r in range(count):
        k = kappa[r]
        f = _first_pass(k, steps)
        if f == p:
            out[r, 0] = shape[r] * CLASSES + min((k - steps[p] - ACTIVE) // CLASS_STEPS, CLASSES - 1)
            continue
        stays = np.int64(zero[shape[r], min(k - steps[p] - ACTIVE, SPAN - 1)])
        stayed = np.int64(zero[shape[r], min(k - steps[p - 1] - ACTIVE, SPAN - 1)])
        out[r, 0] = zero_base + min(ZERO_TABLES * stays // stayed, ZERO_TABLES - 1)
        for b in range(f, p):
            n = parts[r % DITHERS, p, f, b]
            if n > 1:
                slope = (log_width[r % DITHERS, p, f, b] - PART_LOG[n] - k - SLOPE_LOW) // CLASS_STEPS
                out[r, b + 1] = cell_base + (n - 2) * SLOPES + min(max(slope, 0), SLOPES - 1)
    return out


@_jit
def _number(c, kind, low, fresh, step, parts, width):  # type: ignore[no-untyped-def]
    """The number that codes value `c` in a pass; `parts` and `width` are those of its cell."""
    size = abs(c)
    if kind == 0:
        if size < _DEAD * step:
            return 0
        q = min(int(size / step + (np.float32(1) - _DEAD)), _LIMIT) if fresh else 1
        q = max(q, 1)
        return -q if c < 0 else q
    return min(max(int((size - abs(low)) / width * parts), 0), parts - 1)


@_jit
def price(c, kinds, lows, kappa, shape, p, steps, parts, log_width, width, zero, cost, first, shift, escape):  # type: ignore[no-untyped-def]
    """Bits that pass `p` of one group costs: what `quantize` and the coder would make, estimated from the tables."""
    count = active(kappa, steps[p])
    tables = tables_of(kappa, shape, count, p, steps, parts, log_width, zero)
    step = np.float32(2.0 ** (steps[p] / OCTAVE))
    bits = 0.0
    for r in range(count):
        f = _first_pass(kappa[r], steps)
        if f == p:
            table = tables[r, 0]
            bits += _fresh_bits(c[r], np.float32(1) / step, cost[table], first[table], shift[table], escape[table])
            continue
        row_bits = np.float32(0)
        for t in range(c.shape[1]):
            kind = numba.int64(kinds[r, t])
            table = tables[r, kind]
            if table < 0:
                continue
            b = max(kind - 1, 0)
            q = _number(c[r, t], kind, lows[r, t], False, step, parts[r % DITHERS, p, f, b], width[r % DITHERS, p, f, b])
            row_bits += cost[table, q - first[table]]
        bits += row_bits
    return bits


@_jit
def _fresh_bits(c, inverse_step, cost, first, shift, escape):  # type: ignore[no-untyped-def]
    """Bits of one coefficient's tokens when they are coded for the first time."""
    bits = np.float32(0)
    escaped = cost[escape]
    for t in range(c.size):
        q = int(min(abs(c[t]) * inverse_step, np.float32(_LIMIT)) + (np.float32(1) - _DEAD))
        symbol = (q - first) >> shift
        bits += min(cost[symbol], escaped) if symbol < escape else escaped
    return bits


@_jit
def quantize(c, kinds, lows, kappa, p, steps, parts, width, numbers):  # type: ignore[no-untyped-def]
    """Numbers of pass `p` of one group, int16 [active, T], before `advance` moves the state on."""
    step = np.float32(2.0 ** (steps[p] / OCTAVE))
    for r in range(numbers.shape[0]):
        f = _first_pass(kappa[r], steps)
        fresh = f == p
        for t in range(c.shape[1]):
            kind = numba.int64(0) if fresh else numba.int64(kinds[r, t])
            b = max(kind - 1, 0)
            numbers[r, t] = _number(c[r, t], kind, lows[r, t], fresh, step, parts[r % DITHERS, p, f, b], width[r % DITHERS, p, f, b])


@_jit
def advance(numbers, kinds, lows, kappa, p, steps, parts, width):  # type: ignore[no-untyped-def]
    """Move the cells on by the numbers of pass `p`; encoder and decoder do the same."""
    step = np.float32(2.0 ** (steps[p] / OCTAVE))
    for r in range(numbers.shape[0]):
        f = _first_pass(kappa[r], steps)
        fresh = f == p
        for t in range(numbers.shape[1]):
            q = numba.int64(numbers[r, t])
            if fresh or kinds[r, t] == 0:
                if q == 0:
                    kinds[r, t] = 0
                    lows[r, t] = 0
                else:
                    kinds[r, t] = p + 1
                    edge = (numba.float32(abs(q) - 1) + _DEAD) * step
                    lows[r, t] = -edge if q < 0 else edge
            elif q > 0:
                b = kinds[r, t] - 1
                move = numba.float32(q) * width[r % DITHERS, p + 1, f, b]
                lows[r, t] += -move if lows[r, t] < 0 else move


@_jit
def rebuild(kinds, lows, kappa, shape, passes, steps, width, log_width, centre, out):  # type: ignore[no-untyped-def]
    """Values at the middles of mass of their cells after `passes` passes: float32 into out [at least active, T], 0 where dropped."""
    count = active(kappa, steps[passes - 1])
    for r in range(count):
        k = kappa[r]
        f = _first_pass(k, steps)
        inner = np.float32(DEAD_ZONE + 0.5) * width[0, f + 1, f, f]
        for t in range(kinds.shape[1]):
            kind = numba.int64(kinds[r, t])
            if kind == 0:
                out[r, t] = 0
                continue
            b = kind - 1
            cell = width[r % DITHERS, passes, f, b]
            low = lows[r, t]
            if b > f and b == passes - 1:
                which = 2
            elif b == passes - 1 and abs(low) < inner:
                which = 0
            else:
                which = 1
            at = min(max(k - log_width[r % DITHERS, passes, f, b] - ACTIVE, 0), SPAN - 1)
            size = abs(low) + centre[shape[r], which, at] * cell
            out[r, t] = -size if low < 0 else size
    out[count:] = 0
