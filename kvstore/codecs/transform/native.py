"""A batch of blocks through the transform codec on the CPU: numba's loops over threads, and one matrix product a group.

Groups follow each other, so that no more than one group's rows lie in memory beside the cache. What is the same for equal tokens is
computed once for each different token of the batch. Coefficients that are 0 nearly everywhere, at 16 times half of those that are coded
at all, stay out of the matrix product (`rows.add_rare`).

Legend: B blocks, T tokens a block, N = B·T, C columns of a group, R coefficients, U different tokens, S sketch rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvstore.layout import KVLayout

from ..parallel import spread
from .classes import put_back
from .coder import BlockDecoder
from .groups import Group
from .payload import LayerPayload
from .projection import Projection
from .rows import Cache, Rotations, set_known, subtract_known

#: Coefficients that differ from 0 less often than in this share of tokens are left out of the matrix product, by the product's type.
_RARE = {torch.float32: 0.3, torch.bfloat16: 0.06}


@dataclass(frozen=True, slots=True)
class Known:
    """What the tokens of a batch say beforehand.

    Parameters
    ----------
    rows : Tensor [U, rank] or None
        Of the prediction table, for each different token.
    which : int64 [B, T]
        The row of each token.
    """

    rows: torch.Tensor | None
    which: np.ndarray

    @classmethod
    def of(cls, projection: Projection, tokens_BT: torch.Tensor | None, blocks: int, length: int) -> Known:
        if tokens_BT is None or not projection.predicts:
            return cls(None, np.zeros((blocks, length), dtype=np.int64))
        ids, which = torch.unique(tokens_BT.cpu(), return_inverse=True)
        return cls(projection.rows(ids), which.view(blocks, length).numpy())

    def values(self, projection: Projection, group: int) -> np.ndarray:
        """Expected values of each different token, float32 [U, C]."""
        return projection.base(group, self.rows, 1 if self.rows is None else len(self.rows)).numpy()


@dataclass(frozen=True, slots=True)
class Transformed:
    """A batch's coefficients, and what a measure of its error needs.

    Parameters
    ----------
    coefficients : float32 [R, N] of each group
    seen : float32 [N, 2·S] of each group
        The values themselves in the random directions of `Projection.sketches`.
    """

    coefficients: list[np.ndarray]
    seen: list[np.ndarray]


def transform(
    layout: KVLayout, projection: Projection, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, tokens_BT: torch.Tensor | None
) -> Transformed:
    """Coefficients of K and V [B, L, H, T, D]."""
    blocks, length = positions.shape
    known, rotations = Known.of(projection, tokens_BT, blocks, length), Rotations(layout, positions, inverse=True)
    out = Transformed([], [])
    for i, group in enumerate(projection.groups):
        base, cache = known.values(projection, i), Cache(k, v, group, rotations.of(group))
        rows_NC = torch.empty(blocks * length, group.width)
        tiles = rows_NC.numpy().reshape(blocks, length, -1)

        def load(b: int, cache: Cache = cache, base: np.ndarray = base, tiles: np.ndarray = tiles) -> None:
            cache.take(b, tiles[b])
            subtract_known(tiles[b], base, known.which[b])

        spread(load, range(blocks))
        out.coefficients.append((projection.encoders[i].T @ rows_NC.T).numpy())
        halves = zip(rows_NC.split(group.width // 2, 1), projection.directions[i], strict=True)
        out.seen.append(torch.cat([half @ signs for half, signs in halves], 1).numpy())
    return out


def restore(
    layout: KVLayout, projection: Projection, payloads: Sequence[Sequence[LayerPayload]], exact: Sequence[bool],
    positions: torch.Tensor, tokens_BT: torch.Tensor | None, order_BT: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor,
) -> Iterator[Group]:
    """Write the values of K and V [B, L, H, T, D], all but a block's exact first token; gives each group once it is written.

    Parameters
    ----------
    positions, tokens_BT : int64 [B, T]
        In the order of coding.
    order_BT : int64 [B, T], optional
        Where each block's tokens lie in it, in that order; as they come if not given.

    Raises
    ------
    CorruptBlockError
    """
    blocks, length = positions.shape
    decoders = [BlockDecoder.of(projection.models, length - e, p) for e, p in zip(exact, payloads, strict=True)]
    known, rotations = Known.of(projection, tokens_BT, blocks, length), Rotations(layout, positions, inverse=False)
    for i, group in enumerate(projection.groups):
        rows_NC = _group_rows(projection, i, group, decoders, known, length)
        cache, tiles = Cache(k, v, group, rotations.of(group)), rows_NC.numpy().reshape(blocks, length, -1)
        spread(lambda b, cache=cache, tiles=tiles: cache.put(b, tiles[b]), range(blocks))
        if order_BT is not None:
            put_back(k[:, group.first : group.last], order_BT)
            put_back(v[:, group.first : group.last], order_BT)
        yield group


def _group_rows(
    projection: Projection, i: int, group: Group, decoders: Sequence[BlockDecoder], known: Known, length: int
) -> torch.Tensor:
    """Values of one group, float32 [N, C], keys unrotated."""
    kappa, shape, basis, base = projection.kappa[i], projection.shape[i], projection.decoders[i], known.values(projection, i)
    elements = projection.decoder_elements[i]
    rows_NC = torch.empty(len(decoders) * length, group.width)
    rows = rows_NC.numpy()
    counts = [d.common(kappa, shape, _RARE[basis.dtype]) for d in decoders]
    common = np.empty((max(counts), len(rows)), dtype=np.float32)

    def decode(b: int) -> None:
        begin, end = b * length, (b + 1) * length
        coded = end - decoders[b].tokens
        set_known(rows[begin:end], base, known.which[b])
        common[:, begin:coded] = 0
        decoders[b].group(i, kappa, shape, counts[b], common, coded, rows[coded:end], elements)

    spread(decode, range(len(decoders)))
    return projection.add_common(i, torch.from_numpy(common), rows_NC)
