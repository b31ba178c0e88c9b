"""All streams of a batch of blocks in flat arrays, as an accelerator's kernels read them: made at once, uploaded at once.

A *job* is one class of one block in one group of layers: its streams follow each other pass by pass.

Legend: G groups, K classes of all blocks (*parts*), P passes (of the longest, padded to a power of two), D rows' dithers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .classes import TokenClasses
from .ladder import Ladders, step_sizes
from .models import ACTIVE
from .payload import LayerPayload, joined_steps

#: Bytes; what kernels assume of the addresses that they are given.
_ALIGNED = 16


@dataclass(frozen=True, slots=True)
class Streams:
    """What is coded in a batch of blocks, and where.

    Parameters
    ----------
    words : list of uint16 arrays
        To be read as one.
    word_begin, word_count : int64, int32 [G, K, P]
    rows : int32 [G, K, P]
        Coefficients that are coded in each pass; 0 beyond the part's last.
    passes, tokens, columns : int32 [K]
        `columns`: where among the tokens of all blocks, in the order of coding, the part begins.
    steps, step_sizes : int32, float32 [K, P]
    ladders : Ladders
    number_begin, table_begin : int64 [G, K]
        Room of each job among all numbers ([pass, row, token] in it) and all tables ([row, pass (pass + 1) / 2 + kind]).
    numbers, tables : int
        Room for all.
    """

    words: list[np.ndarray]
    word_begin: np.ndarray
    word_count: np.ndarray
    rows: np.ndarray
    passes: np.ndarray
    tokens: np.ndarray
    columns: np.ndarray
    steps: np.ndarray
    step_sizes: np.ndarray
    ladders: Ladders
    number_begin: np.ndarray
    table_begin: np.ndarray
    numbers: int
    tables: int

    @classmethod
    def of(cls, kappa: Sequence[np.ndarray], payloads: Sequence[Sequence[LayerPayload]], exact: Sequence[bool], length: int) -> Streams:
        """Of blocks of `length` tokens, the first of them coded or `exact`. Raises CorruptBlockError for impossible steps."""
        parts: list[tuple[list[int], int, int]] = []
        for b, (layers, e) in enumerate(zip(payloads, exact, strict=True)):
            steps, coded = joined_steps(layers), length - e
            runs = (layers[0].classes or TokenClasses.alike(coded)).runs
            parts += [([m + offset for m in steps], end - first, b * length + e + first) for offset, first, end in runs]
        passes = np.array([len(steps) for steps, _, _ in parts], dtype=np.int32)
        wide = 1 << int(passes.max() - 1).bit_length()
        steps = np.array([s + s[-1:] * (wide - len(s)) for s, _, _ in parts], dtype=np.int32)
        tokens, columns = (np.array([part[i] for part in parts], dtype=np.int32) for i in (1, 2))
        rows = np.stack([np.searchsorted(-k, -(steps + ACTIVE), side="right") for k in kappa]).astype(np.int32)
        last = rows[:, :, -1].astype(np.int64)
        rows[:, np.arange(wide) >= passes[:, None]] = 0
        number_begin, numbers = _begins(last * tokens * passes)
        table_begin, tables = _begins(last * (passes * (passes + 1) // 2))
        sizes = step_sizes(steps)
        ladders, words = Ladders.of(steps, sizes), _places(payloads, (len(kappa), len(parts), wide))
        sizes = sizes.astype(np.float32)
        return cls(*words, rows, passes, tokens, columns, steps, sizes, ladders, number_begin, table_begin, numbers, tables)

    @property
    def jobs(self) -> int:
        return self.number_begin.size

    def most_rows(self, group: int) -> int:
        """Coefficients of a group that are coded in any block."""
        return int(self.rows[group].max())

    def on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The arrays by name, `ladders` by those of its own, on `device` by one copy."""
        names = ("word_begin", "word_count", "rows", "passes", "tokens", "columns", "steps", "step_sizes", "number_begin", "table_begin")
        cells = {name: getattr(self.ladders, name) for name in ("parts", "log_width", "width")}
        single = {name: getattr(self, name) for name in names} | cells
        return upload({"words": self.words} | {name: [a] for name, a in single.items()}, device)


def _begins(sizes: np.ndarray) -> tuple[np.ndarray, int]:
    """Where each of the rooms of these sizes begins, and the size of all."""
    ends = np.cumsum(sizes, dtype=np.int64).reshape(sizes.shape)
    return ends - sizes, int(sizes.sum())


def _places(payloads: Sequence[Sequence[LayerPayload]], shape: tuple[int, int, int]) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Words of all layers, and the begin and count of each stream [G, K, P] in them."""
    words: list[np.ndarray] = []
    begin, count = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int32)
    at = part = 0
    for layers in payloads:
        runs, first = layers[0].runs // shape[0], 0
        for layer in layers:
            mine = np.s_[:, part : part + runs, first : first + len(layer.steps)]
            ends = layer.ends.reshape(-1)
            begin[mine] = (at + ends[:-1]).reshape(shape[0], runs, -1)
            count[mine] = np.diff(ends).reshape(shape[0], runs, -1)
            words.append(layer.words)
            at, first = at + len(layer.words), first + len(layer.steps)
        part += runs
    return words, begin, count


def upload(arrays: Mapping[str, Sequence[np.ndarray]], device: torch.device) -> dict[str, torch.Tensor]:
    """Arrays on `device`, by one copy that nothing waits for; a sequence of several becomes one array of one dimension."""
    places, size = {}, 0
    for name, parts in arrays.items():
        places[name] = size
        size += -(-sum(a.nbytes for a in parts) // _ALIGNED) * _ALIGNED + _ALIGNED
    staging = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    host = staging.numpy()
    for name, parts in arrays.items():
        room = host[places[name] :][: sum(a.nbytes for a in parts)].view(parts[0].dtype)
        np.concatenate([a.reshape(-1) for a in parts], out=room)
    there, out = staging.to(device, non_blocking=True), {}
    for name, parts in arrays.items():
        dtype = torch.from_numpy(np.empty(0, dtype=parts[0].dtype)).dtype
        flat = there[places[name] :][: sum(a.nbytes for a in parts)].view(dtype)
        out[name] = flat.view(parts[0].shape) if len(parts) == 1 else flat
    return out
