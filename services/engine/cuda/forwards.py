"""Forwards of a model over frames, launched one kernel after the other or replayed as they were recorded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from services.engine.attention import Step
from services.engine.live import LivePool

from .batch import Batch
from .frame import Frame, Shape, Span

#: Tokens of a cache that the tables of the smallest frames are for; each further size is so many times as large. A frame's size costs
#: idle programs and changes no numbers.
LEAST_TOKENS, GROWTH = 4096, 8
log = logging.getLogger(__name__)


class Forwards:
    """Runs `model` over `pool`. One thread calls everything.

    Parameters
    ----------
    model : module
        Loaded with the attention of `services.engine.attention`.
    pool : LivePool
        One that `can_attend`.
    """

    def __init__(self, model: torch.nn.Module, pool: LivePool) -> None:
        self._model, self._pool = model, pool
        self._frames: dict[Shape, tuple[Frame, Batch]] = {}

    def run(self, ids: Sequence[int], positions: Sequence[int], wanted: Sequence[int], step: Step) -> torch.Tensor:
        """Logits [wanted, vocabulary] of one step, in the model's dtype."""
        spans = [Span(tile.kv, tile.row, tile.start, tile.count) for tile in step.tiles]
        spans += [Span(token.kv, row, token.at, 1) for row, token in enumerate(step.tokens)]
        most = max(span.start + span.count for span in spans)
        tokens = bool(step.tokens)
        shape = Shape(tokens, len(ids), len(ids) if tokens else -(-len(ids) // self._pool.block_tokens), len(wanted), self._pages(most))
        if shape not in self._frames:
            frame = Frame(shape, self._pool.block_tokens, self._pool.device)
            self._frames[shape] = (frame, Batch(self._pool, frame))
        frame, step.native = self._frames[shape]
        frame.fill(ids, positions, wanted, spans)
        return self._launch(frame, step)

    def _launch(self, frame: Frame, step: Step) -> torch.Tensor:
        out: Any = self._model(
            input_ids=frame.ids[None], position_ids=frame.positions[None], use_cache=False, logits_to_keep=frame.wanted,
            concertina_step=step,
        )  # fmt: skip
        return out.logits[0]

    def _pages(self, tokens: int) -> int:
        """Pages of a request in the smallest tables that have room for `tokens`, a multiple of 16."""
        room = LEAST_TOKENS
        while room < tokens:
            room *= GROWTH
        return -(-room // (16 * self._pool.block_tokens)) * 16
