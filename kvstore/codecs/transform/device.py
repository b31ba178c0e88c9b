"""A batch of blocks through the transform codec on an accelerator: torch's operations, and Triton's kernel for the entropy coder.

Decoding stays on the device: the streams go there as they are, and what a pass needs from the host is bookkeeping of a few kilobytes (which
table codes which row). Encoding computes the coefficients there and hands them to the host, where steps are searched and streams written:
the blob is host memory in the end, and publishing waits for nobody.

Legend: B blocks, T tokens a block, N = B·T, R coefficients, P passes, D rows' dithers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from kvstore.errors import CorruptBlockError
from kvstore.layout import KVLayout

from . import kernels
from .groups import Group, gather, split
from .ladder import DITHER, Ladder
from .models import LAW, Models
from .moments import unrotate
from .native import Transformed
from .payload import LayerPayload, parts_of
from .projection import Projection


class Coder(Protocol):
    """What decodes streams: `entropy.triton_rans.TritonCoder`, or a stand-in of the tests."""

    def decode(
        self, words: Sequence[torch.Tensor], contexts: Sequence[torch.Tensor], tables: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[bool]]:
        """Numbers of each stream, int16 [rows, tokens], and whether it was intact."""


def transform(
    layout: KVLayout, projection: Projection, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, tokens_BT: torch.Tensor | None
) -> Transformed:
    """Coefficients of K and V [B, L, H, T, D], computed on their device and copied to the host."""
    positions, rows, out = positions.to(k.device), projection.rows(tokens_BT), Transformed([], [])
    for i, group in enumerate(projection.groups):
        mine, rope = slice(group.first, group.last), layout.rope.for_layers(group.first, group.last)
        x = gather(unrotate(rope, k[:, mine], positions), v[:, mine])
        x -= projection.base(i, rows, len(x))
        out.coefficients.append((projection.encoders[i].T @ x.T).cpu().numpy())
        halves = zip(x.split(group.width // 2, 1), projection.directions[i], strict=True)
        out.seen.append(torch.cat([half @ signs.to(x.device) for half, signs in halves], 1).cpu().numpy())
    return out


def restore(
    layout: KVLayout, projection: Projection, coder: Coder, payloads: Sequence[Sequence[LayerPayload]], exact: Sequence[bool],
    positions: torch.Tensor, tokens_BT: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor,
) -> Iterator[Group]:
    """Write the values of K and V [B, L, H, T, D], all but a block's exact first token; gives each group once it is written.

    Raises
    ------
    CorruptBlockError
    """
    blocks, length = positions.shape
    positions, rows = positions.to(k.device), projection.rows(tokens_BT)
    parts = [
        (b * length + e + part.first, part)
        for b, (layers, e) in enumerate(zip(payloads, exact, strict=True))
        for part in parts_of(layers, length - e)
    ]
    for i, group in enumerate(projection.groups):
        cells = [
            _Cells(projection.models, part.ladder, projection.kappa[i], projection.shape[i], part.words[i], part.tokens, k.device)
            for _, part in parts
        ]
        _decode_passes(coder, cells, i)
        c_RN = torch.zeros(max(c.count for c in cells), blocks * length, device=k.device)
        for (begin, part), cell in zip(parts, cells, strict=True):
            c_RN[: cell.count, begin : begin + part.tokens] = cell.values()
        x = projection.add_common(i, c_RN, projection.base(i, rows, blocks * length))
        keys, values = split(x, group, layout, blocks)
        mine, rope = slice(group.first, group.last), layout.rope.for_layers(group.first, group.last)
        k[:, mine] = unrotate(rope, keys, positions, inverse=False)
        v[:, mine] = values
        yield group


def _decode_passes(coder: Coder, cells: Sequence[_Cells], group: int) -> None:
    """All passes of one group, those of the same number for all blocks (of the same length) at once."""
    for p in range(max(len(c.ladder.steps) for c in cells)):
        for tokens in sorted({c.tokens for c in cells}):
            going_on = [c for c in cells if c.tokens == tokens and p < len(c.ladder.steps)]
            if not going_on:
                continue
            numbers, intact = coder.decode(*(list(column) for column in zip(*(c.stream(p) for c in going_on), strict=True)))
            if not all(intact):
                raise CorruptBlockError(f"the entropy-coded streams of group {group} are damaged")
            for c, q in zip(going_on, numbers, strict=True):
                c.advance(p, q)


class _Cells:
    """The cells that one block's coefficients of one group are in; `kernels.advance` and `kernels.rebuild` in torch.

    Parameters
    ----------
    words : (uint16 [all passes' words], int64 [P + 1])
    tokens : int
        Coded tokens.
    """

    def __init__(
        self, models: Models, ladder: Ladder, kappa: np.ndarray, shape: np.ndarray, words: tuple[np.ndarray, np.ndarray], tokens: int,
        device: torch.device,
    ) -> None:
        self.models, self.ladder, self.kappa, self.shape, self.tokens, self.device = models, ladder, kappa, shape, tokens, device
        self.words, self.ends = torch.from_numpy(words[0]).to(device), words[1]
        self.count = int(kernels.active(kappa, ladder.steps[-1], LAW))
        self.kinds = torch.zeros(self.count, tokens, dtype=torch.uint8, device=device)
        self.lows = torch.zeros(self.count, tokens, device=device)
        rows = np.arange(self.count)
        self.first_pass = (kappa[: self.count, None] - ladder.steps[None] < LAW.active).sum(1)
        self.dither = rows % len(DITHER)

    def stream(self, p: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Words, contexts and tables of pass `p`."""
        now = int(kernels.active(self.kappa, self.ladder.steps[p], LAW))
        steps, parts, log_width, _ = self.ladder.arrays
        tables = kernels.tables_of(self.kappa, self.shape, now, p, steps, parts, log_width, self.models.zero, LAW)
        return self.words[self.ends[p] : self.ends[p + 1]], self.kinds[:now], torch.from_numpy(tables).to(self.device)

    def advance(self, p: int, numbers: torch.Tensor) -> None:
        """Move the cells on by the numbers of pass `p`, int16 [now, tokens]."""
        now, q = len(numbers), numbers.float()
        kinds, lows = self.kinds[:now], self.lows[:now]
        width = self._by_cell(self.ladder.width[:, p + 1], kinds)
        leaves = (kinds == 0) & (numbers != 0)
        edge = (q.abs() - 1 + float(LAW.dead)) * float(np.float32(2.0 ** (self.ladder.steps[p] / LAW.octave)))
        moved = lows + torch.where(lows < 0, -1.0, 1.0) * q * width
        lows.copy_(torch.where(leaves, torch.where(q < 0, -edge, edge), torch.where(kinds > 0, moved, lows)))
        kinds.masked_fill_(leaves, p + 1)

    def values(self) -> torch.Tensor:
        """Values at the middles of mass of their cells, float32 [count, tokens]."""
        passes, ladder = len(self.ladder.steps), self.ladder
        b, f = self.kinds.long() - 1, torch.from_numpy(self.first_pass).to(self.device)[:, None]
        inner = (LAW.dead + np.float32(0.5)) * ladder.width[0, self.first_pass + 1, self.first_pass, self.first_pass]
        last, near = b == passes - 1, self.lows.abs() < torch.from_numpy(inner).to(self.device)[:, None]
        which = torch.where(last & (b > f), 2, torch.where(last & near, 0, 1))
        log_width = self._by_cell(ladder.log_width[:, passes], self.kinds)
        kappa = torch.from_numpy(self.kappa[: self.count]).to(self.device)[:, None]
        at = (kappa - log_width - LAW.active).clamp(0, LAW.span - 1).long()
        shape = torch.from_numpy(self.shape[: self.count].astype(np.int64)).to(self.device)[:, None]
        centre = torch.from_numpy(self.models.centre).to(self.device)[shape, which, at]
        size = self.lows.abs() + centre * self._by_cell(ladder.width[:, passes], self.kinds)
        return torch.where(self.kinds == 0, 0.0, torch.where(self.lows < 0, -size, size))

    def _by_cell(self, table_DPP: np.ndarray, kinds: torch.Tensor) -> torch.Tensor:
        """The entry of each value's cell, by row's dither, first pass, and the pass in which the value left the dead zone."""
        rows = torch.from_numpy(table_DPP[self.dither[: len(kinds)], self.first_pass[: len(kinds)]])
        return rows.to(self.device).gather(1, (kinds.long() - 1).clamp_min(0))
