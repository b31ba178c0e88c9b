"""Interleaved rANS on the CPU (J. Duda, arXiv 1311.2540; interleaving: F. Giesen, arXiv 1402.3392), compiled by numba.

A stream codes a matrix of numbers [rows, tokens], row after row. Number n belongs to lane ``n mod LANES``; each lane is a coder of its
own with a 32-bit state, so that several decode at once (a CPU overlaps them, a GPU gives each a thread). Format, little-endian
16-bit words::

    2 · LANES words   final states of the encoder, low half first
    words             what the lanes need: for each run of LANES numbers first those of all symbols, then those of all plain bits

States live in [2^16, 2^32) and take in a word when they fall below. The encoder starts each lane at 2^16; a decoder that does not end
there, or has words left, has read garbage. Memory: nothing but the given arrays.

The kernels release the GIL and use no threads of their own: callers spread streams over a pool (`kvstore.codecs.parallel`).
They use no constant of another module: numba's cache on disk notices changes of this file alone.
"""

from __future__ import annotations

import numba
import numpy as np

#: Frequencies of a table sum to 2^12.
PROBABILITY_BITS = 12
#: The number that an escape's plain bits count from.
ESCAPE_BASE = -(1 << 15)
LANES = 8
LOW = 1 << 16
#: Words at the head of every stream.
STATE_WORDS = 2 * LANES

_jit = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")
# Unsigned indices, so that numba does not look for negative ones: half of the time of these loops.
_u64, _u32 = numba.uint64, numba.uint32
_MASK = numba.uint32((1 << PROBABILITY_BITS) - 1)


def max_words(count: int) -> int:
    """Words that a stream of `count` numbers can take at most: one for the symbol and one for its plain bits."""
    return STATE_WORDS + 2 * count


@_jit
def _push_bits(state, lane, offset, bits, out, at):  # type: ignore[no-untyped-def]
    """Put the low `bits` of `offset` into a lane as they are. Returns where the stream now begins."""
    x = state[lane]
    if x >= (numba.uint64(1) << (32 - bits)):
        at -= 1
        out[at] = x & 0xFFFF
        x >>= _u32(16)
    low = _u32(offset) & ((_u32(1) << _u32(bits)) - _u32(1))
    state[lane] = _u32((x << _u32(bits)) | low)
    return at


@_jit
def encode(numbers, contexts, tables, out, entries, slots, first, shift, escape):  # type: ignore[no-untyped-def]
    """Code one stream.

    Parameters
    ----------
    numbers : int16 [rows, tokens]
    contexts : uint8 [rows, tokens]
        Which of the row's tables each number uses.
    tables : int16 [rows, contexts]
        Table of the book; -1 where nothing is coded.
    out : uint16 [at least max_words(rows * tokens)]
        The stream is written to its *end*.
    entries … escape
        `Book.arrays`.

    Returns
    -------
    int
        Index in `out` at which the stream begins.
    """
    rows, tokens = numbers.shape
    count, row, token = rows * tokens, rows - 1, tokens
    state = np.full(LANES, LOW, dtype=np.uint32)
    picked = np.empty(LANES, dtype=np.uint64)  # entry of each lane's symbol, 0 for none
    at = out.size
    for begin in range((count - 1) // LANES * LANES, -1, -LANES):
        lanes = min(LANES, count - begin)
        for lane in range(lanes - 1, -1, -1):
            if token == 0:
                token = tokens
                row -= 1
            token -= 1
            table = numba.int64(tables[_u64(row), _u64(contexts[_u64(row), _u64(token)])])
            if table < 0:
                picked[_u64(lane)] = 0
                continue
            number = numba.int64(numbers[_u64(row), _u64(token)])
            offset = number - first[_u64(table)]
            symbol, last = offset >> numba.int64(shift[_u64(table)]), numba.int64(escape[_u64(table)])
            entry = entries[_u64(table), _u64(min(max(symbol, 0), last if last >= 0 else symbol))]
            if last >= 0 and (symbol < 0 or symbol >= last or entry & _u64(0xFFFF) == 0):
                entry, offset = entries[_u64(table), _u64(last)], number - ESCAPE_BASE
            picked[_u64(lane)] = entry
            if entry >> _u64(48) > 0:
                at = _push_bits(state, lane, offset, numba.int64(entry >> _u64(48)), out, at)
        at = _push_symbols(picked, lanes, state, out, at)
    for lane in range(LANES - 1, -1, -1):
        out[at - 1] = state[lane] >> 16
        out[at - 2] = state[lane] & 0xFFFF
        at -= 2
    return at


@_jit
def _push_symbols(picked, lanes, state, out, at):  # type: ignore[no-untyped-def]
    """Code the symbols of one run. Returns where the stream now begins."""
    for lane in range(lanes - 1, -1, -1):
        entry = picked[_u64(lane)]
        if entry == 0:
            continue
        x, f = state[_u64(lane)], _u32(entry & _u64(0xFFFF))
        if x >= _u64(f) << _u64(32 - PROBABILITY_BITS):
            at -= 1
            out[_u64(at)] = numba.uint16(x)
            x >>= _u32(16)
        quotient = _u32(x // f)
        state[_u64(lane)] = _u32((quotient << _u32(PROBABILITY_BITS)) + (x - quotient * f) + _u32((entry >> _u64(16)) & _u64(0xFFFF)))
    return at


@_jit
def _read_states(words, state):  # type: ignore[no-untyped-def]
    """Take every lane's first state from the head of the stream. False for one that `encode` cannot have left."""
    if words.size < STATE_WORDS:
        return False
    for lane in range(LANES):
        state[lane] = words[2 * lane] | (_u32(words[2 * lane + 1]) << _u32(16))
        if state[lane] < LOW:
            return False
    return True


@_jit
def _is_closed(state):  # type: ignore[no-untyped-def]
    """Whether every lane is back where the encoder began."""
    for lane in range(LANES):
        if state[lane] != LOW:
            return False
    return True


@_jit
def _pull_bits(words, at, state, extra, numbers, begin, lanes):  # type: ignore[no-untyped-def]
    """Add the plain bits that `extra` says to the numbers of one run of lanes. Returns the next word's place, -1 past the end."""
    tokens = numbers.shape[1]
    for lane in range(lanes):
        bits = extra[lane]
        if bits == 0:
            continue
        x = state[lane]
        row, token = divmod(begin + lane, tokens)
        numbers[row, token] += numba.int32(x & ((_u32(1) << bits) - _u32(1)))
        x >>= bits
        if x < LOW:
            if at >= words.size:
                return -1
            x = _u32((x << _u32(16)) | words[at])
            at += 1
        state[lane] = x
    return at


@_jit
def decode(words, contexts, tables, numbers, entries, slots, first, shift, escape):  # type: ignore[no-untyped-def]
    """Read one stream into `numbers`; the inverse of `encode`, with the same arguments.

    Parameters
    ----------
    words : uint16 [any]
        Untrusted.
    numbers : int16 [rows, tokens]
        Written where a table applies, 0 elsewhere.

    Returns
    -------
    bool
        Whether `words` was a stream that `encode` could have written. `numbers` is garbage if not.
    """
    rows, tokens = numbers.shape
    state = np.empty(LANES, dtype=np.uint32)
    if not _read_states(words, state):
        return False
    at, size, first_lane = STATE_WORDS, words.size, 0
    extra = np.zeros(LANES, dtype=np.uint32)  # plain bits that each lane still has to read
    pending = _u32(0)
    for row in range(rows):
        row_tables, row_contexts, row_numbers = tables[row], contexts[row], numbers[row]
        token = 0
        while token < tokens:
            lanes = min(LANES - first_lane, tokens - token)
            for i in range(lanes):
                lane, here = _u64(first_lane + i), _u64(token + i)
                table = row_tables[_u64(row_contexts[here])]
                number, bits = numba.int16(0), _u32(0)
                if table >= 0:
                    x = state[lane]
                    slot = x & _MASK
                    entry = entries[_u64(table), _u64(slots[_u64(table), _u64(slot)])]
                    x = _u32(_u32(entry & _u64(0xFFFF)) * (x >> _u32(PROBABILITY_BITS)) + slot - _u32((entry >> _u64(16)) & _u64(0xFFFF)))
                    if x < LOW:
                        if at >= size:
                            return False
                        x = _u32((x << _u32(16)) | words[_u64(at)])
                        at += 1
                    state[lane] = x
                    number, bits = numba.int16(entry >> _u64(32)), _u32(entry >> _u64(48))
                extra[lane] = bits
                pending |= bits
                row_numbers[here] = number
            token += lanes
            first_lane = (first_lane + lanes) % LANES
            if pending and first_lane == 0:
                pending = _u32(0)
                at = _pull_bits(words, at, state, extra, numbers, row * tokens + token - LANES, LANES)
                if at < 0:
                    return False
    if pending:
        at = _pull_bits(words, at, state, extra, numbers, rows * tokens - first_lane, first_lane)
    return at == size and _is_closed(state)
