"""The quantizer's inner loops, compiled by numba: numbers from coefficients, their price, and coefficients from numbers.

All work on one block. Legend: R coefficients (rows) of a group by falling sigma, T tokens, P passes. `kinds` [R, T] says in which pass a
value left the dead zone, plus one; 0 while it is inside. `lows` [R, T] is the signed lower edge of its cell. `loud` [R] is 1 for rows
in which a value has left it: most rows of a block are quiet, and cost a glance instead of a loop.

Every number that is defined elsewhere comes in as an argument, `law` (`models.Law`): numba's cache on disk notices changes of a kernel's
own file alone.
"""

from __future__ import annotations

import numba
import numpy as np

_jit = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")
#: For sums and maxima that no byte depends on: in any order, so that they become vector instructions.
_jit_sums = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy", fastmath={"reassoc", "nnan", "nsz"})
_LIMIT = 32767
_PRICED = 64


@_jit
def active(kappa, m, law):  # type: ignore[no-untyped-def]
    """How many of the coefficients (kappa [R] falling) are coded at step index `m`."""
    low, high = 0, kappa.size
    while low < high:
        middle = (low + high) // 2
        if kappa[middle] - m >= law.active:
            low = middle + 1
        else:
            high = middle
    return low


@_jit
def _first_pass(kappa, steps, law):  # type: ignore[no-untyped-def]
    f = 0
    while kappa - steps[f] < law.active:
        f += 1
    return f


@_jit
def _step(steps, p, law):  # type: ignore[no-untyped-def]
    return np.float32(2.0 ** (steps[p] / law.octave))


@_jit
def tables_of(kappa, shape, count, p, steps, parts, log_width, zero, law):  # type: ignore[no-untyped-def]
    """Table of each coefficient (of the first `count`) for each kind of value in pass `p`: int16 [count, p + 1], -1 for none."""
    out = np.full((count, p + 1), -1, dtype=np.int16)
    zero_base = zero.shape[0] * law.classes
    cell_base = zero_base + law.zero_tables
    for r in range(count):
        k, d = kappa[r], r % parts.shape[0]
        f = _first_pass(k, steps, law)
        if f == p:
            out[r, 0] = shape[r] * law.classes + min((k - steps[p] - law.active) // law.class_steps, law.classes - 1)
            continue
        stays = np.int64(zero[shape[r], min(k - steps[p] - law.active, law.span - 1)])
        stayed = np.int64(zero[shape[r], min(k - steps[p - 1] - law.active, law.span - 1)])
        out[r, 0] = zero_base + min(law.zero_tables * stays // stayed, law.zero_tables - 1)
        for b in range(f, p):
            n = parts[d, p, f, b]
            if n > 1:
                slope = (log_width[d, p, f, b] - law.part_log[n] - k - law.slope_low) // law.class_steps
                out[r, b + 1] = cell_base + (n - 2) * law.slopes + min(max(slope, 0), law.slopes - 1)
    return out


@_jit_sums
def measure(c, peaks, energies):  # type: ignore[no-untyped-def]
    """Largest magnitude and sum of squares of each row of one block: float32 [R] each. Returns the largest of all."""
    largest = np.float32(0)
    for r in range(c.shape[0]):
        row = c[r]
        peak = energy = np.float32(0)
        for t in range(row.size):
            peak = max(peak, abs(row[t]))
            energy += row[t] * row[t]
        peaks[r], energies[r] = peak, energy
        largest = max(largest, peak)
    return largest


@_jit
def _fresh_number(c, step, dead):  # type: ignore[no-untyped-def]
    """The number that codes value `c` when it is coded for the first time."""
    size = abs(c)
    if size < dead * step:
        return 0
    q = max(min(int(size / step + (np.float32(1) - dead)), _LIMIT), 1)
    return -q if c < 0 else q


@_jit
def _next_number(c, low, cut, parts, width):  # type: ignore[no-untyped-def]
    """The number that codes value `c` in a further pass: its side if it leaves the dead zone (up to `cut`), else the part of its cell.

    `parts` and `width` are those of the cell, and `parts` is 0 in the dead zone.
    """
    size = abs(c)
    if parts == 0:
        if size < cut:
            return 0
        return -1 if c < 0 else 1
    return min(max(int((size - abs(low)) / width * parts), 0), parts - 1)


@_jit
def price(c, kinds, lows, loud, peaks, kappa, shape, p, steps, parts, log_width, width, zero, cost, first, shift, escape, law, every):  # type: ignore[no-untyped-def]
    """Bits that pass `p` of one group costs: what `quantize` and the coder would make, estimated from the tables.

    Beyond the first `_PRICED` rows, which hold the most, only every `every`-th one is looked at, each dither's alike.
    """
    count, tokens = active(kappa, steps[p], law), kinds.shape[1]
    tables = tables_of(kappa, shape, count, p, steps, parts, log_width, zero, law)
    step = _step(steps, p, law)
    cut, total = law.dead * step, 0.0
    for r in range(count):
        weight = 1 if r < _PRICED else every
        if (r + r // 4) % weight:
            continue
        f, d, table = _first_pass(kappa[r], steps, law), r % parts.shape[0], tables[r, 0]
        if loud[r] == 0 and peaks[r] < cut:
            bits = np.float32(tokens) * cost[table, (0 - first[table]) >> shift[table]]
        elif f == p:
            bits = _fresh_bits(c[r], np.float32(1) / step, law.dead, cost[table], first[table], shift[table], escape[table])
        else:
            bits = _further_bits(c[r], kinds[r], lows[r], parts[d, p, f], width[d, p, f], cut, tables[r], cost, first)
        total += bits * weight
    return total


@_jit
def _fresh_bits(c, inverse_step, dead, cost, first, shift, escape):  # type: ignore[no-untyped-def]
    """Bits of one coefficient's tokens when they are coded for the first time."""
    bits = np.float32(0)
    escaped = cost[escape]
    for t in range(c.size):
        q = int(min(abs(c[t]) * inverse_step, np.float32(_LIMIT)) + (np.float32(1) - dead))
        symbol = (q - first) >> shift
        bits += min(cost[symbol], escaped) if symbol < escape else escaped
    return bits


@_jit
def _further_bits(c, kinds, lows, parts, width, cut, tables, cost, first):  # type: ignore[no-untyped-def]
    """Bits of one coefficient's tokens in a further pass; `parts` and `width` by the pass in which a value left the dead zone."""
    bits = np.float32(0)
    for t in range(c.size):
        kind = numba.uint64(kinds[t])
        table = numba.int64(tables[kind])
        if table < 0:
            continue
        cell = kind - numba.uint64(kind > 0)
        q = _next_number(c[t], lows[t], cut, parts[cell] if kind > 0 else 0, width[cell])
        bits += cost[numba.uint64(table), numba.uint64(q - first[numba.uint64(table)])]
    return bits


@_jit
def quantize(c, kinds, lows, loud, peaks, kappa, p, steps, parts, width, law, numbers):  # type: ignore[no-untyped-def]
    """Numbers of pass `p` of one group, int16 [active, T], before `advance` moves the state on."""
    tokens = kinds.shape[1]
    step = _step(steps, p, law)
    cut = law.dead * step
    for r in range(numbers.shape[0]):
        f, d = _first_pass(kappa[r], steps, law), r % parts.shape[0]
        row = c[r]
        if loud[r] == 0 and peaks[r] < cut:
            numbers[r, :] = 0
        elif f == p:
            for t in range(tokens):
                numbers[r, t] = _fresh_number(row[t], step, law.dead)
        else:
            for t in range(tokens):
                kind = numba.int64(kinds[r, t])
                n = parts[d, p, f, kind - 1] if kind > 0 else 0
                numbers[r, t] = _next_number(row[t], lows[r, t], cut, n, width[d, p, f, max(kind - 1, 0)])


@_jit
def advance(numbers, kinds, lows, loud, kappa, p, steps, parts, width, law):  # type: ignore[no-untyped-def]
    """Move the cells on by the numbers of pass `p`; encoder and decoder do the same."""
    step = _step(steps, p, law)
    for r in range(numbers.shape[0]):
        some = numba.int16(0)
        for t in range(numbers.shape[1]):
            some |= numbers[r, t]
        if some == 0:
            continue
        f, d = _first_pass(kappa[r], steps, law), r % parts.shape[0]
        loud[r] = 1
        for t in range(numbers.shape[1]):
            q = numba.int64(numbers[r, t])
            if q == 0:
                continue
            if kinds[r, t] == 0:
                kinds[r, t] = p + 1
                edge = (numba.float32(abs(q) - 1) + law.dead) * step
                lows[r, t] = -edge if q < 0 else edge
            else:
                move = numba.float32(q) * width[d, p + 1, f, kinds[r, t] - 1]
                lows[r, t] += -move if lows[r, t] < 0 else move


@_jit
def _rebuild_row(kinds, lows, k, d, passes, steps, width, log_width, centre, law, out):  # type: ignore[no-untyped-def]
    """Values of one row at the middles of mass of their cells after `passes` passes; 0 in the dead zone."""
    f = _first_pass(k, steps, law)
    inner = (law.dead + np.float32(0.5)) * width[0, f + 1, f, f]
    for t in range(kinds.size):
        kind = numba.int64(kinds[t])
        if kind == 0:
            out[t] = 0
            continue
        b = kind - 1
        low = lows[t]
        which = 1
        if b == passes - 1:
            which = 2 if b > f else (0 if abs(low) < inner else 1)
        at = min(max(k - log_width[d, passes, f, b] - law.active, 0), law.span - 1)
        size = abs(low) + centre[which, at] * width[d, passes, f, b]
        out[t] = -size if low < 0 else size


@_jit
def rebuild(kinds, lows, loud, kappa, shape, passes, steps, width, log_width, centre, law, out, begin):  # type: ignore[no-untyped-def]
    """Values of the first rows into columns `begin` … of `out` float32 [rows, columns]; 0 where nothing is coded."""
    tokens, count = kinds.shape[1], min(active(kappa, steps[passes - 1], law), out.shape[0])
    for r in range(out.shape[0]):
        row = out[r, begin : begin + tokens]
        if r < count and loud[r]:
            d = r % width.shape[0]
            _rebuild_row(kinds[r], lows[r], kappa[r], d, passes, steps, width, log_width, centre[shape[r]], law, row)
        else:
            row[:] = 0


@_jit_sums
def residue(c, kinds, lows, loud, energies, kappa, shape, passes, steps, width, log_width, centre, law, sketch, seen):  # type: ignore[no-untyped-def]
    """What is lost after `passes` passes: returns the sum of squared errors of one group's coefficients.

    Takes what a decoder would rebuild, times `sketch` float32 [R, S], from `seen` float32 [T, S].
    """
    tokens, count = kinds.shape[1], active(kappa, steps[passes - 1], law)
    values, lost = np.empty(tokens, dtype=np.float32), 0.0
    for r in range(c.shape[0]):
        if r >= count or not loud[r]:
            lost += energies[r]
            continue
        d = r % width.shape[0]
        _rebuild_row(kinds[r], lows[r], kappa[r], d, passes, steps, width, log_width, centre[shape[r]], law, values)
        row, error = c[r], np.float32(0)
        for t in range(tokens):
            error += (row[t] - values[t]) * (row[t] - values[t])
        lost += error
        source = sketch[r]
        for t in range(tokens):
            value = values[t]
            if value != 0:
                target = seen[t]
                for i in range(target.size):
                    target[i] -= value * source[i]
    return lost
