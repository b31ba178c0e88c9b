"""The stream format of `kvstore.codecs.entropy.rans` on CUDA, bit for bit: one program a stream, one thread a lane.

Runs on the CPU too, under ``TRITON_INTERPRET=1``; the tests do that. `triton` is optional and imported with this module only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from .book import ESCAPE_BITS, MAX_SYMBOLS, Book
from .rans import ESCAPE_BASE, LANES, LOW, PROBABILITY_BITS, STATE_WORDS, max_words


@triton.jit
def _decode_kernel(
    words, word_begin, word_count, contexts, tables, table_begin, numbers, number_begin, number_count, intact,
    freq, start, slots, first, shift, escape, tokens, columns,
    LANES: tl.constexpr, LOW: tl.constexpr, BITS: tl.constexpr, SYMBOLS: tl.constexpr, ESCAPE_BITS: tl.constexpr, ESCAPE_BASE: tl.constexpr,
):  # fmt: skip
    stream = tl.program_id(0)
    lane = tl.arange(0, LANES)
    base, size = tl.load(word_begin + stream), tl.load(word_count + stream)
    at0, count = tl.load(number_begin + stream), tl.load(number_count + stream)
    table0 = tl.load(table_begin + stream)
    enough = lane * 0 + size >= 2 * LANES
    low_half = tl.load(words + base + 2 * lane, mask=enough, other=0).to(tl.uint32)
    high_half = tl.load(words + base + 2 * lane + 1, mask=enough, other=0).to(tl.uint32)
    x = low_half | (high_half << 16)
    bad = tl.sum((x < LOW).to(tl.int32), 0)
    at = tl.full((), 2 * LANES, tl.int64)
    for begin in range(0, count, LANES):
        n = begin + lane
        inside = n < count
        context = tl.load(contexts + at0 + n, mask=inside, other=0).to(tl.int64)
        table = tl.load(tables + table0 + (n // tokens) * columns + context, mask=inside, other=-1).to(tl.int64)
        live = inside & (table >= 0)
        slot = x & ((1 << BITS) - 1)
        symbol = tl.load(slots + table * (1 << BITS) + slot.to(tl.int64), mask=live, other=0).to(tl.int64)
        f = tl.load(freq + table * SYMBOLS + symbol, mask=live, other=0).to(tl.uint32)
        before = tl.load(start + table * SYMBOLS + symbol, mask=live, other=0).to(tl.uint32)
        x = tl.where(live, f * (x >> BITS) + slot - before, x)
        need = live & (x < LOW)
        place = at + tl.cumsum(need.to(tl.int64), 0) - 1
        word = tl.load(words + base + place, mask=need & (place < size), other=0).to(tl.uint32)
        bad += tl.sum((need & (place >= size)).to(tl.int32), 0)
        x = tl.where(need, (x << 16) | word, x)
        at += tl.sum(need.to(tl.int64), 0)
        plain = tl.load(shift + table, mask=live, other=0).to(tl.uint32)
        number = tl.load(first + table, mask=live, other=0).to(tl.int32) + (symbol.to(tl.int32) << plain.to(tl.int32))
        escaped = live & (symbol == tl.load(escape + table, mask=live, other=-1).to(tl.int64))
        plain = tl.where(escaped, ESCAPE_BITS, plain).to(tl.uint32)
        number = tl.where(escaped, ESCAPE_BASE, number)
        one = tl.full((LANES,), 1, tl.uint32)
        number += (x & ((one << plain) - 1)).to(tl.int32)
        x = tl.where(live, x >> plain, x)
        need = live & (x < LOW)
        place = at + tl.cumsum(need.to(tl.int64), 0) - 1
        word = tl.load(words + base + place, mask=need & (place < size), other=0).to(tl.uint32)
        bad += tl.sum((need & (place >= size)).to(tl.int32), 0)
        x = tl.where(need, (x << 16) | word, x)
        at += tl.sum(need.to(tl.int64), 0)
        tl.store(numbers + at0 + n, tl.where(live, number, 0).to(tl.int16), mask=inside)
    bad += tl.sum((x != LOW).to(tl.int32), 0) + (at != size).to(tl.int32)
    tl.store(intact + stream, (bad == 0).to(tl.int8))


@triton.jit
def _encode_kernel(
    numbers, number_begin, number_count, contexts, tables, table_begin, words, word_end, word_begin,
    freq, start, first, shift, escape, tokens, columns,
    LANES: tl.constexpr, LOW: tl.constexpr, BITS: tl.constexpr, SYMBOLS: tl.constexpr, ESCAPE_BITS: tl.constexpr, ESCAPE_BASE: tl.constexpr,
):  # fmt: skip
    stream = tl.program_id(0)
    lane = tl.arange(0, LANES)
    at0, count = tl.load(number_begin + stream), tl.load(number_count + stream)
    table0, at = tl.load(table_begin + stream), tl.load(word_end + stream)
    x = tl.full((LANES,), LOW, tl.uint32)
    runs = (count + LANES - 1) // LANES
    for run in range(runs):
        n = (runs - 1 - run) * LANES + lane
        inside = n < count
        context = tl.load(contexts + at0 + n, mask=inside, other=0).to(tl.int64)
        table = tl.load(tables + table0 + (n // tokens) * columns + context, mask=inside, other=-1).to(tl.int64)
        live = inside & (table >= 0)
        number = tl.load(numbers + at0 + n, mask=live, other=0).to(tl.int32)
        offset = number - tl.load(first + table, mask=live, other=0).to(tl.int32)
        plain = tl.load(shift + table, mask=live, other=0).to(tl.int32)
        symbol = offset >> plain
        last = tl.load(escape + table, mask=live, other=-1).to(tl.int32)
        listed = (symbol >= 0) & ((last < 0) | (symbol < last))
        f = tl.load(freq + table * SYMBOLS + symbol, mask=live & listed, other=0).to(tl.uint32)
        escaped = live & (last >= 0) & ((f == 0) | (offset < 0))
        symbol = tl.where(escaped, last, symbol)
        plain = tl.where(escaped, ESCAPE_BITS, plain).to(tl.uint32)
        offset = tl.where(escaped, number - ESCAPE_BASE, offset).to(tl.uint32)
        one = tl.full((LANES,), 1, tl.uint32)
        some = live & (plain > 0)
        spill = some & ((x >> (32 - plain)) > 0)
        after = tl.sum(spill.to(tl.int64), 0)
        place = at - after + tl.cumsum(spill.to(tl.int64), 0) - 1
        tl.store(words + place, (x & 0xFFFF).to(tl.uint16), mask=spill)
        at -= after
        x = tl.where(spill, x >> 16, x)
        x = tl.where(some, (x << plain) | (offset & ((one << plain) - 1)), x)
        f = tl.load(freq + table * SYMBOLS + symbol, mask=live, other=1).to(tl.uint32)
        before = tl.load(start + table * SYMBOLS + symbol, mask=live, other=0).to(tl.uint32)
        spill = live & ((x >> (32 - BITS)) >= f)
        after = tl.sum(spill.to(tl.int64), 0)
        place = at - after + tl.cumsum(spill.to(tl.int64), 0) - 1
        tl.store(words + place, (x & 0xFFFF).to(tl.uint16), mask=spill)
        at -= after
        x = tl.where(spill, x >> 16, x)
        x = tl.where(live, ((x // f) << BITS) + (x % f) + before, x)
    at -= 2 * LANES
    tl.store(words + at + 2 * lane, (x & 0xFFFF).to(tl.uint16))
    tl.store(words + at + 2 * lane + 1, (x >> 16).to(tl.uint16))
    tl.store(word_begin + stream, at)


class TritonCoder:
    """Codes many streams at once on one device.

    Parameters
    ----------
    book : Book
    device : torch.device
    """

    def __init__(self, book: Book, device: torch.device | str) -> None:
        self.device = device
        arrays = (book.freq, book.start, book.slots, book.first, book.shift, book.escape)
        self.tables = tuple(torch.from_numpy(a).to(device) for a in arrays)
        self.constants = {
            "LANES": LANES, "LOW": LOW, "BITS": PROBABILITY_BITS, "SYMBOLS": MAX_SYMBOLS,
            "ESCAPE_BITS": ESCAPE_BITS, "ESCAPE_BASE": ESCAPE_BASE,
        }  # fmt: skip

    def encode(
        self, numbers: Sequence[torch.Tensor], contexts: Sequence[torch.Tensor], tables: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Words of each stream, uint16; arguments as `rans.encode`, a tensor a stream, all with the same tokens and contexts."""
        counts = [n.numel() for n in numbers]
        ends = torch.tensor(np.cumsum([max_words(n) for n in counts]), device=self.device)
        words = torch.empty(int(ends[-1]), dtype=torch.uint16, device=self.device)
        begins = torch.empty_like(ends)
        freq, start, _, first, shift, escape = self.tables
        _encode_kernel[(len(counts),)](
            self._flat(numbers), self._begins(counts), self._long(counts), self._flat(contexts), self._flat(tables),
            self._begins([t.numel() for t in tables]), words, ends, begins, freq, start, first, shift, escape,
            numbers[0].shape[1], tables[0].shape[1], **self.constants,
        )  # fmt: skip
        return [words[a:b] for a, b in zip(begins.tolist(), ends.tolist(), strict=True)]

    def decode(
        self, words: Sequence[torch.Tensor], contexts: Sequence[torch.Tensor], tables: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[bool]]:
        """Numbers of each stream, int16 [rows, tokens], and whether it was intact; the inverse of `encode`."""
        counts = [c.numel() for c in contexts]
        sizes = [w.numel() for w in words]
        numbers = torch.zeros(sum(counts), dtype=torch.int16, device=self.device)
        intact = torch.zeros(len(counts), dtype=torch.int8, device=self.device)
        _decode_kernel[(len(counts),)](
            self._flat(words), self._begins(sizes), self._long(sizes), self._flat(contexts), self._flat(tables),
            self._begins([t.numel() for t in tables]), numbers, self._begins(counts), self._long(counts), intact, *self.tables,
            contexts[0].shape[1], tables[0].shape[1], **self.constants,
        )  # fmt: skip
        good = [bool(ok) and size >= STATE_WORDS for ok, size in zip(intact.tolist(), sizes, strict=True)]
        return [n.view(c.shape) for n, c in zip(numbers.split(counts), contexts, strict=True)], good

    def _flat(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        # One element more than needed, so that no pointer is to nothing.
        flat = torch.cat([p.reshape(-1) for p in parts])
        return torch.cat([flat, torch.zeros(1, dtype=flat.dtype, device=flat.device)]).to(self.device)

    def _begins(self, sizes: Sequence[int]) -> torch.Tensor:
        return self._long(np.cumsum([0, *sizes[:-1]]).tolist())

    def _long(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self.device)
