"""Run the model on a flat batch: tiles of prompts, or one token for each of several requests.

Numbers must not depend on who else is in a batch, on how a prompt was cut, or on whether its prefix came from the store. So a prompt
is always computed in tiles of `tile` tokens at multiples of `tile`; several whole ones share a forward only in numbers for which
`services.engine.shapes` has seen this machine give every row the same bits as in any other (`Shapes`). What is left at its end, less
than a tile, is a forward of its own with just these rows: after a long cached prefix that is all there is to compute. On a GPU, where
rows are cheap, all prefill forwards have one number of rows instead (`Shapes.prefill`), and tiles take whole places in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numba
import torch

from kvstore.errors import ConfigError

from . import cuda
from .attention import Masks, Step, Tile, Token
from .cpu.prompts import Prompts, can_attend_prompts
from .cpu.tokens import Batch, can_attend_tokens
from .live import LiveKV, LivePool
from .presses.base import Press

if TYPE_CHECKING:
    from .cuda.forwards import Forwards


@dataclass(frozen=True, slots=True)
class Shapes:
    """Row counts that give the same bits for each row: how many `tiles` of prompts, and tokens in multiples of `quantum` up to `rows`.

    Where `prefill` is not 0, every forward of tiles is padded to so many rows, a multiple of the tile.
    """

    tiles: tuple[int, ...]
    quantum: int
    rows: int
    prefill: int = 0


@dataclass(frozen=True, slots=True)
class PromptTile:
    """Up to a tile of one prompt's tokens, the first at position `start`, a multiple of the tile.

    `logits` asks for those of its last token; `press` is shown the queries.
    """

    kv: LiveKV
    start: int
    tokens: Sequence[int]
    logits: bool = False
    press: Press | None = None


@dataclass(frozen=True, slots=True)
class NextToken:
    """The last token of one request, at `position` of the sequence; it joins the end of its cache."""

    kv: LiveKV
    token: int
    position: int
    press: Press | None = None


class Runner:
    """Forwards of one model. All calls come from one thread.

    Parameters
    ----------
    model : module
        A causal language model loaded with the attention of `services.engine.attention`.
    pool : LivePool
        Its pages are tiles.
    """

    def __init__(self, model: torch.nn.Module, pool: LivePool) -> None:
        self.model, self.pool, self.layout = model, pool, pool.layout
        self.tile, self.device = pool.block_tokens, pool.device
        self.shapes = Shapes(tiles=(1,), quantum=8, rows=8)
        self._masks = Masks()
        self.forwards: Forwards | None = None
        if cuda.can_attend(pool):
            from .cuda.forwards import Forwards  # needs Triton

            self.forwards = Forwards(model, pool)

    @torch.inference_mode()
    def prefill(self, tiles: Sequence[PromptTile], between: Callable[[], None] | None = None) -> torch.Tensor:
        """Compute whole tiles, as many as one of `shapes.tiles`, or one partial tile; several of one prompt must be in order.

        Where forwards are padded, partial tiles may be among the others.

        `between` is called in each layer, and may decode: forwards keep nothing in the model, so one may run within another.

        Returns
        -------
        Tensor [tiles that asked for logits, vocabulary], float32.
        """
        ids, positions, spans, wanted = [], [], [], []
        fixed = self.shapes.prefill
        for part in tiles:
            _pad(ids, positions, -len(ids) % self.tile if fixed else 0)
            row, count = len(ids), len(part.tokens)
            ids += part.tokens
            positions += range(part.start, part.start + count)
            part.kv.reserve(part.start + count)
            part.kv.length = part.start + count
            spans.append(Tile(part.kv, row, part.start, count, part.press))
            if part.logits:
                wanted.append(row + count - 1)
        _pad(ids, positions, fixed - len(ids) if fixed else 0)
        heads = max(len(wanted), fixed // self.tile)
        native = Prompts(spans) if can_attend_prompts(self.pool) else None
        return self._forward(ids, positions, wanted, heads, Step(tiles=tuple(spans), native=native, masks=self._masks, between=between))

    @torch.inference_mode()
    def decode(self, rows: Sequence[NextToken]) -> torch.Tensor:
        """Compute one token for each of at most `shapes.rows` requests.

        Returns
        -------
        Tensor [rows, vocabulary], float32.
        """
        tokens = []
        for row in rows:
            at = row.kv.length
            row.kv.reserve(at + 1)
            row.kv.length = at + 1
            row.kv.appended(row.position)
            tokens.append(Token(row.kv, at, row.press))
        ids, positions = [row.token for row in rows], [row.position for row in rows]
        _pad(ids, positions, -len(rows) % self.shapes.quantum)
        native = Batch([(token.kv, token.at) for token in tokens]) if can_attend_tokens(self.pool) else None
        step = Step(tokens=tuple(tokens), native=native, masks=self._masks)
        return self._forward(ids, positions, list(range(len(rows))), len(rows), step)

    @property
    def replays(self) -> bool:
        """Whether forwards are recorded."""
        return self.forwards is not None and self.forwards.recorded

    def record(self, tokens: int) -> None:
        """Record all forwards over caches of up to `tokens`, to be replayed from now on; see `Forwards.record`."""
        shapes = self.shapes
        prefill = shapes.prefill, self._heads(shapes.prefill // self.tile)
        self.forwards.record(prefill, range(shapes.quantum, shapes.rows + 1, shapes.quantum), tokens)

    def _forward(self, ids: list[int], positions: list[int], wanted: list[int], heads: int, step: Step) -> torch.Tensor:
        """Logits of the rows in `wanted`; the output head computes at least `heads`."""
        padded = wanted + [wanted[-1] if wanted else 0] * (self._heads(heads) - len(wanted))
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                logits = self._logits(ids, positions, padded, step)[: len(wanted)].to(torch.float32, copy=True)
                torch.cuda.current_stream().synchronize()  # steps are timed, and the next one's inputs go where this one's are
        else:
            numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # counts for this thread alone
            logits = self._logits(ids, positions, padded, step)[: len(wanted)].float()
        if step.layers_seen != self.layout.layers:
            kind, layers = type(self.model).__name__, self.layout.layers
            raise ConfigError(f"{kind} called attention {step.layers_seen} times for {layers} layers; the model cannot be served")
        return logits

    def _heads(self, wanted: int) -> int:
        """Rows of the output head. It is a product like any other: they are padded to the same counts."""
        return -(-max(wanted, 1) // self.shapes.quantum) * self.shapes.quantum

    def _logits(self, ids: list[int], positions: list[int], wanted: list[int], step: Step) -> torch.Tensor:
        if self.forwards is not None:
            return self.forwards.run(ids, positions, wanted, step)
        out = self.model(
            input_ids=torch.tensor([ids], device=self.device),
            position_ids=torch.tensor([positions], device=self.device),
            use_cache=False,
            logits_to_keep=torch.tensor(wanted, device=self.device),
            concertina_step=step,
        )
        return out.logits[0]


def _pad(ids: list[int], positions: list[int], count: int) -> None:
    """Further rows, whose numbers go nowhere."""
    ids += [0] * count
    positions += [0] * count
