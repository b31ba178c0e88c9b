"""The stream format of `kvstore.codecs.entropy.rans` in plain Python: slow, obvious, and the oracle of its tests."""

from __future__ import annotations

import numpy as np

from .book import ESCAPE_BITS, TOTAL, Book
from .rans import ESCAPE_BASE, LANES, LOW, PROBABILITY_BITS, STATE_WORDS


def encode(numbers: np.ndarray, contexts: np.ndarray, tables: np.ndarray, book: Book) -> list[int]:
    """Words of the stream that codes `numbers` [rows, tokens]; see `rans.encode`."""
    state, pushed = [LOW] * LANES, []

    def push(lane: int, freq: int, start: int, total_bits: int) -> None:
        x = state[lane]
        if x >= freq << (32 - total_bits):
            pushed.append(x & 0xFFFF)
            x >>= 16
        state[lane] = ((x // freq) << total_bits) + x % freq + start

    for begin in reversed(range(0, numbers.size, LANES)):
        run = []
        for n in range(begin, min(begin + LANES, numbers.size)):
            row, token = divmod(n, numbers.shape[1])
            table, number = int(tables[row, contexts[row, token]]), int(numbers[row, token])
            if table < 0:
                continue
            escape, bits = int(book.escape[table]), int(book.shift[table])
            offset = number - int(book.first[table])
            symbol = offset >> bits
            if escape >= 0 and (not 0 <= symbol < escape or book.freq[table, symbol] == 0):
                symbol, bits, offset = escape, ESCAPE_BITS, number - ESCAPE_BASE
            run.append((n % LANES, table, symbol, bits, offset % (1 << bits)))
        for lane, _, _, bits, low in reversed(run):
            if bits:
                push(lane, 1, low, bits)
        for lane, table, symbol, _, _ in reversed(run):
            push(lane, int(book.freq[table, symbol]), int(book.start[table, symbol]), PROBABILITY_BITS)
    head = [half for x in state for half in (x & 0xFFFF, x >> 16)]
    return head + pushed[::-1]


def decode(words: list[int], contexts: np.ndarray, tables: np.ndarray, shape: tuple[int, int], book: Book) -> np.ndarray:
    """The inverse of `encode`. Raises ValueError for words that it cannot have written."""
    if len(words) < STATE_WORDS:
        raise ValueError("the stream is shorter than its states")
    state = [words[2 * i] | words[2 * i + 1] << 16 for i in range(LANES)]
    rest = iter(words[STATE_WORDS:])
    if min(state) < LOW:
        raise ValueError("a state is out of range")

    def refill(lane: int) -> None:
        if state[lane] < LOW:
            word = next(rest, None)
            if word is None:
                raise ValueError("the stream ends early")
            state[lane] = state[lane] << 16 | word

    numbers = np.zeros(shape, dtype=np.int16)
    for begin in range(0, numbers.size, LANES):
        extra = []
        for n in range(begin, min(begin + LANES, numbers.size)):
            row, token = divmod(n, shape[1])
            table, lane = int(tables[row, contexts[row, token]]), n % LANES
            if table < 0:
                continue
            slot = state[lane] % TOTAL
            symbol = int(np.searchsorted(np.cumsum(book.freq[table], dtype=np.int64), slot, side="right"))
            state[lane] = int(book.freq[table, symbol]) * (state[lane] >> PROBABILITY_BITS) + slot - int(book.start[table, symbol])
            refill(lane)
            bits, number = int(book.shift[table]), int(book.first[table]) + (symbol << int(book.shift[table]))
            if symbol == book.escape[table]:
                bits, number = ESCAPE_BITS, ESCAPE_BASE
            extra.append((row, token, lane, bits, number))
        for row, token, lane, bits, number in extra:
            numbers[row, token] = number + state[lane] % (1 << bits)
            if bits:
                state[lane] >>= bits
                refill(lane)
    if next(rest, None) is not None or state != [LOW] * LANES:
        raise ValueError("the stream does not end where its encoder began")
    return numbers
