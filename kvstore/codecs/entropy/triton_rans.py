"""The stream format of `kvstore.codecs.entropy.rans` on CUDA, bit for bit: one thread a lane of a stream.

A decoder needs the contexts of its numbers, which the passes before leave behind. So one program reads all passes of one matrix, whose
streams run one step behind each other: as many lanes at work, and no waiting for a pass to end.

Runs on the CPU too, under ``TRITON_INTERPRET=1``; the tests do that. `triton` is optional and imported with this module only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from .book import ESCAPE_BITS, MAX_SYMBOLS, Book
from .rans import ESCAPE_BASE, LANES, LOW, PROBABILITY_BITS, max_words


@triton.jit
def _refill(words, base, size, x, at, bad, live, lane, LOW: tl.constexpr):
    """Let the lanes that fell below `LOW` take in a word each, in their order."""
    need = live & (x < LOW)
    # A digit of 4 bits counts the lanes up to its own, so one sum gives each lane its place.
    ones = tl.full(x.shape, 0x11111111, tl.uint32) << (4 * lane).to(tl.uint32)
    upto = tl.sum(tl.where(need, ones, 0), 1, keep_dims=True).to(tl.uint32)
    place = at + ((upto >> (4 * lane).to(tl.uint32)) & 15).to(tl.int32) - 1
    word = tl.load(words + base + place, mask=need & (place < size), other=0).to(tl.uint32)
    bad |= (need & (place >= size)).to(tl.int32)
    x = tl.where(need, (x << 16) | word, x)
    return x, at + (upto >> 28).to(tl.int32), bad


@triton.jit(do_not_specialize=["parts"])
def decode_kernel(
    words, word_begin, word_count, rows, passes, tokens, tables, table_begin, numbers, number_begin, intact, slots, entries, parts,
    PASSES: tl.constexpr, LANES: tl.constexpr, LOW: tl.constexpr, BITS: tl.constexpr, SYMBOLS: tl.constexpr,
):  # fmt: skip
    """All passes of one job at once, a run of lanes behind each other: pass p finds in `kind` what pass p - 1 knew one step before.

    Arrays as in `transform.streams.Streams`; a value's kind is the pass that first gave it a number that is not 0, plus one.
    """
    job = tl.program_id(0)
    part = job % parts
    p, lane = tl.arange(0, PASSES)[:, None], tl.arange(0, LANES)[None, :]
    last, length = tl.load(passes + part), tl.maximum(tl.load(tokens + part), 1)
    table0, number0 = tl.load(table_begin + job), tl.load(number_begin + job)
    base, size = tl.load(word_begin + job * PASSES + p), tl.load(word_count + job * PASSES + p)
    count = tl.load(rows + job * PASSES + p) * length
    most = tl.load(rows + job * PASSES + last - 1) * tl.load(tokens + part)
    count = tl.minimum(count, most)
    there = (p < last) & (lane >= 0)
    enough = there & (size >= 2 * LANES)
    low_half = tl.load(words + base + 2 * lane, mask=enough, other=0).to(tl.uint32)
    high_half = tl.load(words + base + 2 * lane + 1, mask=enough, other=0).to(tl.uint32)
    x = low_half | (high_half << 16)
    bad = (there & (x < LOW)).to(tl.int32)
    at = tl.full((PASSES, 1), 2 * LANES, tl.int32)
    kind = tl.full((PASSES, LANES), 0, tl.int32)
    one = tl.full((PASSES, LANES), 1, tl.uint32)
    ahead = (4 * tl.maximum(p - 1, 0)).to(tl.int64)
    for step in range((most + LANES - 1) // LANES + last - 1):
        n = (step - p) * LANES + lane
        inside = (n >= 0) & (n < count)
        row = (n // length) * (last * (last + 1) // 2)
        table = tl.load(tables + table0 + row + p * (p + 1) // 2 + kind, mask=inside, other=-1).to(tl.int32)
        live = inside & (table >= 0)
        slot = x & ((1 << BITS) - 1)
        symbol = tl.load(slots + table * (1 << BITS) + slot.to(tl.int32), mask=live, other=0).to(tl.int32)
        entry = tl.load(entries + table * SYMBOLS + symbol, mask=live, other=0)
        before = ((entry >> 16) & 0xFFFF).to(tl.uint32)
        x = tl.where(live, (entry & 0xFFFF).to(tl.uint32) * (x >> BITS) + slot - before, x)
        x, at, bad = _refill(words, base, size, x, at, bad, live, lane, LOW)
        number, plain = ((entry >> 32) & 0xFFFF).to(tl.int32), (entry >> 48).to(tl.int32)
        if tl.max(plain) > 0:
            bits = plain.to(tl.uint32)
            number += (x & ((one << bits) - 1)).to(tl.int32)
            x = x >> bits
            x, at, bad = _refill(words, base, size, x, at, bad, live, lane, LOW)
        number = number.to(tl.int16)
        tl.store(numbers + number0 + p * most + n, number, mask=inside)
        kind = tl.where((kind == 0) & (number != 0), p + 1, kind)
        handed = tl.sum(tl.where(p < PASSES - 1, kind.to(tl.int64) << (4 * p).to(tl.int64), 0), 0, keep_dims=True)
        kind = tl.where(p > 0, ((handed >> ahead) & 15).to(tl.int32), 0)
    bad |= (there & ((x != LOW) | (at != size))).to(tl.int32)
    tl.store(intact + job, (tl.max(bad) == 0).to(tl.int8))


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
    """Encodes many streams at once on one device.

    Parameters
    ----------
    book : Book
    device : torch.device
    """

    def __init__(self, book: Book, device: torch.device | str) -> None:
        self.device = device
        arrays = (book.freq, book.start, book.first, book.shift, book.escape)
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
        _encode_kernel[(len(counts),)](
            self._flat(numbers), self._begins(counts), self._long(counts), self._flat(contexts), self._flat(tables),
            self._begins([t.numel() for t in tables]), words, ends, begins, *self.tables,
            numbers[0].shape[1], tables[0].shape[1], **self.constants,
        )  # fmt: skip
        return [words[a:b] for a, b in zip(begins.tolist(), ends.tolist(), strict=True)]

    def _flat(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        # One element more than needed, so that no pointer is to nothing.
        flat = torch.cat([p.reshape(-1) for p in parts])
        return torch.cat([flat, torch.zeros(1, dtype=flat.dtype, device=flat.device)]).to(self.device)

    def _begins(self, sizes: Sequence[int]) -> torch.Tensor:
        return self._long(np.cumsum([0, *sizes[:-1]]).tolist())

    def _long(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self.device)
