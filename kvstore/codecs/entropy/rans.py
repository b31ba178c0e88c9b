"""Interleaved rANS on the CPU (J. Duda, arXiv 1311.2540; interleaving: F. Giesen, arXiv 1402.3392), compiled by numba.

A stream codes a matrix of numbers [rows, tokens], row after row. Number n belongs to lane ``n mod LANES``; each lane is a coder of its
own with a 32-bit state, so that several decode at once (a CPU overlaps them, a GPU gives each a thread). Format, little-endian
16-bit words::

    2 · LANES words   final states of the encoder, low half first
    words             what the lanes need: for each run of LANES numbers first those of all symbols, then those of all plain bits

States live in [2^16, 2^32) and take in a word when they fall below. The encoder starts each lane at 2^16; a decoder that does not end
there, or has words left, has read garbage. Memory: nothing but the given arrays.

The kernels release the GIL and use no threads of their own: callers spread streams over a pool (`kvstore.codecs.transform.parallel`).
"""

from __future__ import annotations

import numba
import numpy as np

from .book import ESCAPE_BASE, ESCAPE_BITS, PROBABILITY_BITS

LANES = 8
LOW = 1 << 16
_MASK = (1 << PROBABILITY_BITS) - 1
#: Words at the head of every stream.
STATE_WORDS = 2 * LANES

_jit = numba.njit(nogil=True, cache=True, boundscheck=False)


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
        x >>= numba.uint32(16)
    low = numba.uint32(offset) & ((numba.uint32(1) << numba.uint32(bits)) - numba.uint32(1))
    state[lane] = numba.uint32((x << numba.uint32(bits)) | low)
    return at


@_jit
def _read_states(words, state):  # type: ignore[no-untyped-def]
    """Take every lane's first state from the head of the stream. False for one that `encode` cannot have left."""
    if words.size < STATE_WORDS:
        return False
    for lane in range(LANES):
        state[lane] = words[2 * lane] | (numba.uint32(words[2 * lane + 1]) << numba.uint32(16))
        if state[lane] < LOW:
            return False
    return True


@_jit
def encode(numbers, contexts, tables, out, freq, start, slots, first, shift, escape):  # type: ignore[no-untyped-def]
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
    freq … escape
        `Book.arrays`.

    Returns
    -------
    int
        Index in `out` at which the stream begins.
    """
    rows, tokens = numbers.shape
    count = rows * tokens
    state = np.full(LANES, LOW, dtype=np.uint32)
    picked = np.empty((LANES, 2), dtype=np.int32)  # table and symbol of each lane
    at = out.size
    for begin in range((count - 1) // LANES * LANES, -1, -LANES):
        lanes = min(LANES, count - begin)
        for lane in range(lanes - 1, -1, -1):
            row, token = divmod(begin + lane, tokens)
            table = tables[row, contexts[row, token]]
            picked[lane, 0] = table
            if table < 0:
                continue
            offset = numba.int32(numbers[row, token]) - first[table]
            bits = numba.int32(shift[table])
            symbol = offset >> bits
            if escape[table] >= 0 and (offset < 0 or symbol >= escape[table] or freq[table, symbol] == 0):
                symbol = numba.int32(escape[table])
                bits = numba.int32(ESCAPE_BITS)
                offset = numba.int32(numbers[row, token]) - ESCAPE_BASE
            picked[lane, 1] = symbol
            if bits > 0:
                at = _push_bits(state, lane, offset, bits, out, at)
        for lane in range(lanes - 1, -1, -1):
            table, symbol = picked[lane, 0], picked[lane, 1]
            if table < 0:
                continue
            x = state[lane]
            f = numba.uint32(freq[table, symbol])
            if x >= (numba.uint64(f) << (32 - PROBABILITY_BITS)):
                at -= 1
                out[at] = x & 0xFFFF
                x >>= numba.uint32(16)
            state[lane] = numba.uint32(((x // f) << PROBABILITY_BITS) + (x % f) + start[table, symbol])
    for lane in range(LANES - 1, -1, -1):
        out[at - 1] = state[lane] >> 16
        out[at - 2] = state[lane] & 0xFFFF
        at -= 2
    return at


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
        extra[lane] = 0
        x = state[lane]
        row, token = divmod(begin + lane, tokens)
        numbers[row, token] += numba.int32(x & ((numba.uint32(1) << bits) - numba.uint32(1)))
        x >>= bits
        if x < LOW:
            if at >= words.size:
                return -1
            x = numba.uint32((x << numba.uint32(16)) | words[at])
            at += 1
        state[lane] = x
    return at


@_jit
def decode(words, contexts, tables, numbers, freq, start, slots, first, shift, escape):  # type: ignore[no-untyped-def]
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
    size = words.size
    state = np.empty(LANES, dtype=np.uint32)
    if not _read_states(words, state):
        return False
    at = STATE_WORDS
    count = rows * tokens
    extra = np.zeros(LANES, dtype=np.uint32)  # plain bits that each lane still has to read
    for begin in range(0, count, LANES):
        lanes = min(LANES, count - begin)
        row, token = divmod(begin, tokens)
        pending = False
        for lane in range(lanes):
            table = tables[row, contexts[row, token]]
            number = 0
            if table >= 0:
                x = state[lane]
                slot = x & _MASK
                symbol = slots[table, slot]
                x = numba.uint32(freq[table, symbol] * (x >> numba.uint32(PROBABILITY_BITS)) + slot - start[table, symbol])
                if x < LOW:
                    if at >= size:
                        return False
                    x = numba.uint32((x << numba.uint32(16)) | words[at])
                    at += 1
                state[lane] = x
                bits = numba.uint32(shift[table])
                number = first[table] + (numba.int32(symbol) << bits)
                if symbol == escape[table]:
                    bits = numba.uint32(ESCAPE_BITS)
                    number = ESCAPE_BASE
                if bits > 0:
                    extra[lane] = bits
                    pending = True
            numbers[row, token] = number
            token += 1
            if token == tokens:
                token = 0
                row += 1
        if pending:
            at = _pull_bits(words, at, state, extra, numbers, begin, lanes)
            if at < 0:
                return False
    return at == size and _is_closed(state)
