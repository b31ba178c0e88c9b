"""The live KV cache of one request.

Shape suffixes: L layer, H KV head, T token, D head dim, B block.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from kvstore.layout import KVLayout


class LiveKV:
    """K and V of one request, contiguous over tokens for each layer and head, growing in whole blocks.

    One tensor each for K and V keeps attention on plain strided views, with no gather, and lets a codec write blocks straight into
    their place. `length` counts the tokens that attention may see; it is no position once a press has dropped tokens.

    Parameters
    ----------
    layout : KVLayout
    capacity : int
        Tokens to hold at first; rounded up to whole blocks.
    limit : int
        Tokens that it may ever hold.
    block_tokens : int
    device : torch.device
    """

    def __init__(self, layout: KVLayout, capacity: int, limit: int, block_tokens: int, device: torch.device) -> None:
        self.layout, self.block_tokens, self.device = layout, block_tokens, device
        self.limit = -(-limit // block_tokens) * block_tokens
        self.length = 0
        self.positions_LHT: torch.Tensor | None = None
        self.k_LHTD, self.v_LHTD = self._allocate(min(capacity, self.limit))

    @property
    def capacity(self) -> int:
        return self.k_LHTD.shape[2]

    @property
    def size_bytes(self) -> int:
        """Bytes of whole blocks in use, the unit of `live_kv_bytes`."""
        return -(-self.length // self.block_tokens) * self.block_tokens * self.layout.bytes_per_token

    def _allocate(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        lay, rounded = self.layout, -(-max(tokens, 1) // self.block_tokens) * self.block_tokens
        shape = (lay.layers, lay.kv_heads, rounded, lay.head_dim)
        return torch.empty(shape, dtype=lay.dtype, device=self.device), torch.empty(shape, dtype=lay.dtype, device=self.device)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all, growing by at least half so that copies stay few."""
        if tokens <= self.capacity:
            return
        k, v = self._allocate(min(max(tokens, self.capacity * 3 // 2), max(self.limit, tokens)))
        k[:, :, : self.length], v[:, :, : self.length] = self.k_LHTD[:, :, : self.length], self.v_LHTD[:, :, : self.length]
        self.k_LHTD, self.v_LHTD = k, v

    def blocks(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [B, L, H, T, D] of K and V of `count` whole blocks from token `start`; room must be reserved."""
        span = slice(start, start + count * self.block_tokens)

        def view(x: torch.Tensor) -> torch.Tensor:
            return x[:, :, span].unflatten(2, (count, self.block_tokens)).permute(2, 0, 1, 3, 4)

        return view(self.k_LHTD), view(self.v_LHTD)

    def keep(self, places_LHN: torch.Tensor) -> None:
        """Drop all tokens but those at these places [L, H, N], ascending, into new tensors (readers of the old ones are safe).

        The heads' tokens differ from then on, so `positions_LHT` says where in the sequence each was.
        """
        count = places_LHN.shape[2]
        before = self.positions_LHT
        positions = places_LHN if before is None else before[:, :, : self.length].gather(2, places_LHN)
        index = places_LHN[..., None].expand(-1, -1, -1, self.layout.head_dim)
        k, v = self._allocate(count)
        torch.gather(self.k_LHTD, 2, index, out=k[:, :, :count])
        torch.gather(self.v_LHTD, 2, index, out=v[:, :, :count])
        self.k_LHTD, self.v_LHTD = k, v
        self.positions_LHT, self.length = positions.clone(), count

    def appended(self, position: int) -> None:
        """The token at the last place was at `position` of the sequence; needs no saying before tokens are dropped."""
        if self.positions_LHT is not None:
            self.positions_LHT = functional.pad(self.positions_LHT, (0, 1), value=position)

    def hidden(self, layer: int, count: int, stop: int, window: int | None) -> torch.Tensor:
        """[H or 1, count, stop]: which tokens the last `count` before place `stop` may not attend to, in one layer."""
        place = torch.arange(stop, device=self.device)
        query = place[stop - count :, None]
        hidden = (place > query)[None]
        if window:
            at = place[None] if self.positions_LHT is None else self.positions_LHT[layer, :, :stop]
            hidden = hidden | (at[:, None, :] <= at[:, stop - count :, None] - window)
        return hidden
