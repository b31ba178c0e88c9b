"""Find out, at start-up, which row counts keep every row's bits.

A matrix product may sum in another order when the number of rows changes, and in 16 bits that changes answers. Which counts agree
depends on the machine and its libraries and is documented by none, so it is measured on the model itself, bit by bit; what does not
agree is not used. The same forwards serve as the warm-up, and give the first estimate of the prefill rate.

Where forwards are padded to one number of rows, what is measured is that a row keeps its bits in each place and beside all others.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from kvstore.clock import Clock

from .live import LiveKV
from .runner import NextToken, PromptTile, Runner, Shapes

#: Candidates for the multiple to which decode batches are padded, cheapest first; the last is the fixed size of a group.
QUANTA = (1, 2, 4, 8)
log = logging.getLogger(__name__)


def pages_needed(tiles: Sequence[int], max_rows: int) -> int:
    """Pages of live cache that `find_shapes` and `warm_up` use."""
    return 2 * max(2, *tiles) + _rounded(max_rows)


def find_shapes(
    runner: Runner, vocab_size: int, tiles: Sequence[int], max_rows: int, clock: Clock, prefill: int = 0
) -> tuple[Shapes, float]:  # fmt: skip
    """The row counts that agree bit by bit, and the measured prefill rate in tokens a second.

    Parameters
    ----------
    tiles : sequence of int
        Counts of tiles wanted in one step; one tile alone is always possible.
    max_rows : int
        Requests wanted in one decode step.
    prefill : int
        Rows to which forwards of tiles are padded, if not 0, a power of two times the tile; decode steps are padded to one number then,
        too. Fewer are taken where tiles do not agree.

    Raises
    ------
    ConfigError
        For a model whose layers do not use attention as `services.engine.attention` expects it.
    """
    runner.shapes = replace(runner.shapes, prefill=prefill)
    generator = torch.Generator().manual_seed(0)
    counts = sorted({1, *tiles})
    prompt = torch.randint(0, vocab_size, (max(counts[-1], 2) * runner.tile,), generator=generator).tolist()
    reference = LiveKV(runner.pool)
    logits, rate = _one_by_one(runner, prompt, reference, clock)
    agreeing = [n for n in counts if n == 1 or _tiles_agree(runner, prompt, n, reference, logits)]
    if prefill > runner.tile and agreeing != counts:
        reference.release()
        log.warning("forwards of %d rows do not keep the bits of tiles in all places; half as many are tried", prefill)
        halved = prefill // 2
        return find_shapes(runner, vocab_size, range(1, halved // runner.tile + 1), max_rows, clock, halved)
    # As many rows as a tile would be computed as one, by other kernels; padded, they are always the same ones.
    count = _rounded(max_rows) if prefill else max(min(max_rows, runner.tile - 1), QUANTA[-1])
    rows = torch.randint(0, vocab_size, (count,), generator=generator).tolist()
    quantum, widest = _decode_counts(runner, reference, rows, (count,) if prefill else QUANTA)
    reference.release()
    shapes = Shapes(tuple(agreeing), quantum, min(widest, -(-max_rows // quantum) * quantum), prefill)
    rate *= max(1, prefill // runner.tile)  # a step of one tile took as long as one of all that it has places for
    log.info("rows keep their bits in %s tiles of %d, and in multiples of %d up to %d", agreeing, runner.tile, quantum, shapes.rows)
    return shapes, rate


def warm_up(runner: Runner, vocab_size: int) -> None:
    """One tile and one token, so that the first request does not pay for what libraries do at their first call."""
    kv = LiveKV(runner.pool)
    runner.prefill([PromptTile(kv, 0, [token % vocab_size for token in range(runner.tile)], logits=True)])
    runner.decode([NextToken(kv, 0, runner.tile)])
    kv.release()


def one_row(runner: Runner) -> None:
    """A step of one row."""
    kv = LiveKV(runner.pool)
    runner.prefill([PromptTile(kv, 0, [0])])
    kv.release()


def _rounded(rows: int) -> int:
    """To a multiple of the fixed group."""
    return -(-rows // QUANTA[-1]) * QUANTA[-1]


def _one_by_one(runner: Runner, prompt: Sequence[int], kv: LiveKV, clock: Clock) -> tuple[list[torch.Tensor], float]:
    """Logits after each tile, and the rate of all tiles but the first, which pays for the warm-up."""
    logits, begin = [], 0.0
    for at in range(0, len(prompt), runner.tile):
        begin = clock.now() if at == runner.tile else begin
        logits.append(runner.prefill([PromptTile(kv, at, prompt[at : at + runner.tile], logits=True)]))
    return logits, (len(prompt) - runner.tile) / max(clock.now() - begin, 1e-6)


def _tiles_agree(runner: Runner, prompt: Sequence[int], count: int, reference: LiveKV, logits: list[torch.Tensor]) -> bool:
    """Whether `count` tiles in one step give the bits that they give one by one."""
    size, stop = runner.tile, count * runner.tile
    kv = LiveKV(runner.pool)
    ours = runner.prefill([PromptTile(kv, at, prompt[at : at + size], logits=at + size == stop) for at in range(0, stop, size)])
    got, want = runner.pool.blocks(kv.page_ids), runner.pool.blocks(reference.page_ids[:count])
    kv.release()
    return all(map(torch.equal, got, want)) and torch.equal(ours, logits[count - 1])


def _decode_counts(runner: Runner, reference: LiveKV, rows: Sequence[int], quanta: Sequence[int]) -> tuple[int, int]:
    """First of `quanta` of which all multiples agree, and the largest of these; else the fixed group."""
    for quantum in quanta:
        counts = range(quantum, len(rows) + 1, quantum)
        want = _decode(runner, reference, rows[:quantum], quantum)
        if all(_rows_agree(runner, reference, rows[:count], quantum, want) for count in counts):
            return quantum, counts[-1]
    return QUANTA[-1], QUANTA[-1]


def _rows_agree(runner: Runner, reference: LiveKV, rows: Sequence[int], quantum: int, want: torch.Tensor) -> bool:
    """Whether the first rows keep their bits in this company, and all rows keep theirs in reverse order."""
    forward = _decode(runner, reference, rows, quantum)
    backward = _decode(runner, reference, rows[::-1], quantum).flip(0)
    return torch.equal(forward[:quantum], want) and torch.equal(forward, backward)


def _decode(runner: Runner, reference: LiveKV, rows: Sequence[int], quantum: int) -> torch.Tensor:
    """Logits of one step after the reference's first tile, which all rows share."""
    batch, size = [], runner.tile
    for token in rows:
        kv = LiveKV(runner.pool)
        runner.pool.pages.share(reference.page_ids[:1])
        kv.adopt(reference.page_ids[:1])
        batch.append(NextToken(kv, token, size))
    runner.shapes = replace(runner.shapes, quantum=quantum, rows=len(rows))
    logits = runner.decode(batch)
    for row in batch:
        row.kv.release()
    return logits
