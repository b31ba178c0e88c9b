"""Forwards of a model over frames, launched one kernel after the other or replayed as they were recorded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from services.engine.attention import Step
from services.engine.live import LivePool

from .batch import Batch
from .frame import Frame, Shape, Span
from .recording import Recorder, Recording

#: Tokens of a cache that the tables of the smallest frames are for; each further size is so many times as large. A frame's size costs
#: idle programs and changes no numbers.
LEAST_TOKENS, GROWTH = 4096, 8


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
        self._recordings: dict[Shape, Recording] = {}
        #: Most tokens of a cache for which there are recordings; all forwards of tiles have tables for so many, one size for all.
        self._recorded = 0
        #: Whether what is recorded is replayed.
        self.replays = True

    def run(self, ids: Sequence[int], positions: Sequence[int], wanted: Sequence[int], step: Step) -> torch.Tensor:
        """Logits [wanted, vocabulary] of one step, in the model's dtype; good until the next one.

        Replayed where it is recorded, unless somebody must see or wait for something in each layer.
        """
        spans = [Span(tile.kv, tile.row, tile.start, tile.count) for tile in step.tiles]
        spans += [Span(token.kv, row, token.at, 1) for row, token in enumerate(step.tokens)]
        most = max(span.start + span.count for span in spans)
        tokens = bool(step.tokens)
        shape = self._shape(tokens, len(ids), len(wanted), most if tokens else max(most, self._recorded))
        frame, batch = self._frame(shape)
        frame.fill(ids, positions, wanted, spans)
        if not self.replays or shape not in self._recordings or not _replayable(step, batch.windowed):
            step.native = batch
            return self._launch(frame, step)
        logits = self._recordings[shape].replay()
        step.layers_seen = self._pool.layout.layers
        if step.between is not None:
            step.between()
        return logits

    def record(self, prefill: tuple[int, int], decode: Sequence[int], tokens: int) -> None:
        """Record forwards over caches of up to `tokens`: those of tiles, with so many rows and rows of the output head, and of tokens.

        Raises RuntimeError for a model whose forward waits for the device.
        """
        recorder = Recorder()
        self._recorded = tokens
        shapes = {self._shape(False, *prefill, tokens)}
        for rows in decode:
            room = LEAST_TOKENS
            shapes.add(self._shape(True, rows, rows, tokens))
            while room < tokens:
                shapes.add(self._shape(True, rows, rows, room))
                room *= GROWTH
        # The largest first: the others find room in what it needed.
        for shape in sorted(shapes, key=lambda shape: (shape.rows, shape.pages), reverse=True):
            frame, batch = self._frame(shape)
            frame.clear()
            self._recordings[shape] = recorder.record(partial(self._launch_anew, frame, batch))

    @property
    def recorded(self) -> bool:
        return bool(self._recordings)

    def forget(self) -> None:
        """Launch all forwards from now on."""
        self._recordings.clear()

    def _shape(self, tokens: bool, rows: int, wanted: int, most: int) -> Shape:
        return Shape(tokens, rows, rows if tokens else -(-rows // self._pool.block_tokens), wanted, self._pages(most))

    def _frame(self, shape: Shape) -> tuple[Frame, Batch]:
        if shape not in self._frames:
            frame = Frame(shape, self._pool.block_tokens, self._pool.device)
            self._frames[shape] = (frame, Batch(self._pool, frame))
        return self._frames[shape]

    def _launch_anew(self, frame: Frame, batch: Batch) -> torch.Tensor:
        return self._launch(frame, Step(native=batch))

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
        if tokens <= self._recorded:
            room = min(room, self._recorded)
        return -(-room // (16 * self._pool.block_tokens)) * 16


def _replayable(step: Step, windowed: bool) -> bool:
    """Whether nothing but the rows' numbers is wanted of any layer."""
    return all(tile.press is None and tile.kv.coming is None for tile in step.tiles) and all(
        token.press is None and not (windowed and token.kv.positions_LHT is not None) for token in step.tokens
    )
