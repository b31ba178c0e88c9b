"""Attention over live caches, through transformers' public attention interface.

A model loaded with ``attn_implementation="concertina"`` calls `attend` in every layer. Which rows of the flat batch belong to which
request comes as a `Step` among the forward's keyword arguments, which transformers hands down to the attention function. Each
request's attention is a call of its own with shapes that depend on that request alone, so its numbers do not depend on who
else is in the batch.

Shape suffixes: N row of the flat batch, Q query head, H KV head, G query heads a KV head, T token, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch.nn import functional
from transformers import AttentionInterface

from kvstore.errors import ConfigError

from .live import LiveKV
from .presses.base import Press

NAME = "concertina"


@dataclass(frozen=True, slots=True)
class Tile:
    """`count` rows of the flat batch from `row` on: prompt tokens of one request, the first at `start` of its cache, all in one page."""

    kv: LiveKV
    row: int
    start: int
    count: int
    press: Press | None


@dataclass(frozen=True, slots=True)
class Token:
    """The next row of the flat batch: the next token of one request, which goes to place `at` of its cache."""

    kv: LiveKV
    at: int
    press: Press | None


class Masks:
    """Additive causal masks of tiles, cut from one tensor that is made once and grows as needed."""

    def __init__(self) -> None:
        self._wide: dict[tuple, torch.Tensor] = {}

    def get(self, tile: Tile, groups: int, dtype: torch.dtype, window: int | None) -> torch.Tensor:
        """[1, 1, G·T, start + T]: 0 where a query may look, -inf elsewhere. Queries of the same group lie together."""
        key = (groups, dtype, window)
        wide = self._wide.get(key)
        if wide is None or wide.shape[2] < tile.start + tile.kv.block_tokens:
            wide = self._wide[key] = self._build(tile, groups, dtype, window)
        first = wide.shape[2] - tile.kv.block_tokens - tile.start
        return wide[:, : tile.count, first : first + tile.start + tile.count].flatten(0, 1)[None, None]

    @staticmethod
    def _build(tile: Tile, groups: int, dtype: torch.dtype, window: int | None) -> torch.Tensor:
        size, device = tile.kv.block_tokens, tile.kv.device
        width = size * max(16, 1 << (tile.start // size + 1).bit_length())
        query = torch.arange(width - size, width, device=device)[:, None]
        key = torch.arange(width, device=device)[None, :]
        hidden = key > query
        if window:
            hidden |= key <= query - window
        mask = torch.zeros(size, width, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
        return mask.repeat(groups, 1, 1)


class Native(Protocol):
    """Code that attends for all rows of a forward at once."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:  # fmt: skip
        """Add K and V [1, H, N, D] to their caches, and attend with queries [1, Q, N, D]: [N, Q, D], 0 in rows of padding."""


@dataclass(slots=True)
class Step:
    """What one forward computes: tiles, or tokens in the order of the rows. Rows beyond the tokens, or of no tile, are padding.

    `native` computes all of them at once, where there is code for it. `between` is called after the attention of each layer of tiles,
    and may run another forward. `layers_seen` proves that every layer came by.
    """

    tiles: tuple[Tile, ...] = ()
    tokens: tuple[Token, ...] = ()
    native: Native | None = None
    masks: Masks = field(default_factory=Masks)
    between: Callable[[], None] | None = None
    layers_seen: int = 0


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    concertina_step: Step | None = None,
    **unused: object,
) -> tuple[torch.Tensor, None]:
    """Write this layer's K and V of all rows into their caches, then attend.

    Parameters
    ----------
    query : Tensor [1, Q, N, D]
    key, value : Tensor [1, H, N, D]
        After RoPE.

    Returns
    -------
    Tensor [1, N, Q, D], and None for the weights.

    Raises
    ------
    ConfigError
        For a model that hands down no step, or asks for what is not supported here.
    """
    step = concertina_step
    if step is None:
        raise ConfigError(f"{type(module).__name__} does not hand keyword arguments to its attention; the model cannot be served")
    for what in ("softcap", "s_aux", "position_bias"):
        if unused.get(what) is not None:
            raise ConfigError(f"{type(module).__name__} needs attention with {what}, which this engine does not have")
    step.layers_seen += 1
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    if step.tokens:
        return _attend_tokens(module.layer_idx, step, query, key, value, scaling, sliding_window)[None], None
    for tile in step.tiles:
        if tile.kv.coming is not None:
            tile.kv.coming.wait(module.layer_idx, step.between)
    out = _attend_tiles(module.layer_idx, step, query, key, value, scaling, sliding_window)
    if step.between is not None:
        step.between()
    return out[None], None


def _attend_tiles(layer, step, query, key, value, scaling, window) -> torch.Tensor:
    """[rows, Q, D]; rows of no tile are padding."""
    if step.native is None:
        # No row is left as it was made: what padding computes must be finite.
        whole = sum(tile.count for tile in step.tiles) == query.shape[2]
        out_NQD = (query.new_empty if whole else query.new_zeros)(query.shape[2], query.shape[1], value.shape[3])
        for tile in step.tiles:
            _attend_tile(layer, tile, step.masks, query, key, value, out_NQD, scaling, window)
        return out_NQD
    out_NQD = step.native.attend(layer, query, key, value, scaling, window)
    for tile in step.tiles:
        if tile.press is not None:
            q_HGTD = query[0, :, tile.row : tile.row + tile.count].reshape(key.shape[1], -1, tile.count, query.shape[3])
            tile.press.see(layer, q_HGTD, tile.kv, tile.start + tile.count, scaling, window)
    return out_NQD


def _attend_tile(layer, tile, masks, query, key, value, out_NQD, scaling, window) -> None:
    rows = slice(tile.row, tile.row + tile.count)
    tile.kv.write(layer, tile.start, key[0, :, rows], value[0, :, rows])
    k, v = tile.kv.layer(layer, tile.start + tile.count)
    heads, dim = k.shape[0], query.shape[3]
    groups = query.shape[1] // heads
    # The query heads that share a KV head become further rows of it: K and V are read once and never repeated.
    packed = query[0, :, rows].reshape(1, heads, groups * tile.count, dim)
    mask = masks.get(tile, groups, query.dtype, window)
    out = functional.scaled_dot_product_attention(packed, k[None], v[None], attn_mask=mask, scale=scaling)
    out_NQD[rows] = out.reshape(heads * groups, tile.count, -1).transpose(0, 1)
    if tile.press is not None:
        tile.press.see(layer, packed.view(heads, groups, tile.count, dim), tile.kv, tile.start + tile.count, scaling, window)


def _attend_tokens(layer, step, query, key, value, scaling, window) -> torch.Tensor:
    """[rows, Q, D]; rows beyond the tokens are padding."""
    native = step.native is not None
    outs = native and step.native.attend(layer, query, key, value, scaling, window)
    rows = []
    for row, token in enumerate(step.tokens):
        # Places are no positions once a press has dropped tokens, and windows count positions.
        if not native or (window and token.kv.positions_LHT is not None):
            rows.append((row, _attend_token(layer, token, *(x[:, :, row : row + 1] for x in (query, key, value)), scaling, window)))
        if token.press is not None:
            q_HGTD = query[0, :, row].view(key.shape[1], -1, 1, query.shape[3])
            token.press.see(layer, q_HGTD, token.kv, token.at + 1, scaling, window)
    if not native:
        outs = query.new_zeros(query.shape[2], query.shape[1], value.shape[3])
    for row, out in rows:
        outs[row] = out
    return outs


def _attend_token(layer, token, query, key, value, scaling, window) -> torch.Tensor:
    """[Q, D] of one token, with torch alone."""
    kv, at = token.kv, token.at
    kv.write(layer, at, key[0], value[0])
    mask = ~kv.hidden(layer, 1, at + 1, window)[None] if window else None
    k, v = kv.layer(layer, at + 1)
    packed = query.reshape(1, key.shape[1], -1, query.shape[3])
    out = functional.scaled_dot_product_attention(packed, k[None], v[None], attn_mask=mask, scale=scaling)
    return out.reshape(query.shape[1], -1)


def register() -> None:
    """Make ``attn_implementation="concertina"`` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, attend)
