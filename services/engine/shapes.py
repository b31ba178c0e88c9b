"""Find out, at start-up, which row counts keep every row's bits.

A matrix product may sum in another order when the number of rows changes, and in 16 bits that changes answers. Which counts agree
depends on the machine and its libraries and is documented by none, so it is measured on the model itself, bit by bit; what does not
agree is not used. The same forwards serve as the warm-up, and give the first estimate of the prefill rate.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from kvstore.clock import Clock

from .live import LiveKV
from .runner import NextToken, PromptTile, Runner, Shapes

#: Candidates for the multiple to which decode batches are padded, cheapest first; the last is the fixed size of a group.
QUANTA = (1, 2, 4, 8)
log = logging.getLogger(__name__)


def find_shapes(runner: Runner, vocab_size: int, max_tiles: int, max_rows: int, clock: Clock) -> tuple[Shapes, float]:
    """The widest row counts that agree bit by bit, and the measured prefill rate in tokens a second.

    Raises
    ------
    ConfigError
        For a model whose layers do not use attention as `services.engine.attention` expects it.
    """
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, vocab_size, (max_tiles * runner.tile,), generator=generator).tolist()
    runner.prefill([PromptTile(runner.new_kv(runner.tile, runner.tile), 0, prompt[: runner.tile])])
    begin = clock.now()
    reference, logits = _prefill(runner, prompt, 1)
    seconds = clock.now() - begin
    tiles = 1
    while tiles < max_tiles:
        kv, other = _prefill(runner, prompt, tiles + 1)
        if not (_same(reference, kv) and torch.equal(logits, other)):
            break
        tiles += 1
    rows = torch.randint(0, vocab_size, (max(max_rows, QUANTA[-1]),), generator=generator).tolist()
    quantum, widest = _decode_counts(runner, prompt[: runner.tile], rows)
    shapes = Shapes(tiles, quantum, min(widest, max(max_rows, quantum)))
    log.info("rows keep their bits in up to %d tiles of %d, and in multiples of %d up to %d", tiles, runner.tile, quantum, shapes.rows)
    return shapes, len(prompt) / max(seconds, 1e-6)


def _prefill(runner: Runner, prompt: Sequence[int], tiles: int) -> tuple[LiveKV, torch.Tensor]:
    kv = runner.new_kv(len(prompt), len(prompt))
    size = runner.tile
    parts = [PromptTile(kv, at, prompt[at : at + size], at + size >= len(prompt)) for at in range(0, len(prompt), size)]
    for first in range(0, len(parts), tiles):
        logits = runner.prefill(parts[first : first + tiles])
    return kv, logits


def _decode_counts(runner: Runner, prompt: Sequence[int], rows: Sequence[int]) -> tuple[int, int]:
    """Smallest quantum of which all multiples agree, and the largest of these; else the fixed group."""
    base = runner.new_kv(runner.tile, runner.tile)
    runner.prefill([PromptTile(base, 0, prompt)])
    for quantum in QUANTA:
        counts = range(quantum, len(rows) + 1, quantum)
        want = _decode(runner, base, rows[:quantum], quantum)
        if all(_agrees(runner, base, rows, count, quantum, want) for count in counts):
            return quantum, counts[-1]
    return QUANTA[-1], QUANTA[-1]


def _agrees(runner: Runner, base: LiveKV, rows: Sequence[int], count: int, quantum: int, want: torch.Tensor) -> bool:
    """Whether the first rows keep their bits among `count`, at the front and, in reverse order, at the back."""
    forward = _decode(runner, base, rows[:count], quantum)
    backward = _decode(runner, base, rows[:count][::-1], quantum).flip(0)
    return torch.equal(forward[:quantum], want) and torch.equal(forward, backward)


def _decode(runner: Runner, base: LiveKV, rows: Sequence[int], quantum: int) -> torch.Tensor:
    batch = []
    for token in rows:
        kv = runner.new_kv(runner.tile + 1, runner.tile + 1)
        kv.k_LHTD[:, :, : base.length], kv.v_LHTD[:, :, : base.length] = base.k_LHTD, base.v_LHTD
        kv.length = base.length
        batch.append(NextToken(kv, token, base.length))
    runner.shapes = Shapes(1, quantum, len(rows))
    return runner.decode(batch)


def _same(a: LiveKV, b: LiveKV) -> bool:
    return torch.equal(a.k_LHTD, b.k_LHTD) and torch.equal(a.v_LHTD, b.v_LHTD)
