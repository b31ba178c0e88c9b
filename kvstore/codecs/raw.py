"""``raw``: the values themselves, bit for bit in the layout's dtype. The yardstick of every other codec.

Payload: for each model layer, K then V, row-major [H, T, D].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvstore.block import Distortion

from .base import Codec, Coded, Stored
from .memory import bytes_of, tensor_from_buffer


class RawCodec(Codec):
    """No compression, no loss."""

    name = "raw"
    wire_id = 1
    worst_error = 0.0

    def _encode(self, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor, starts: Sequence[int], tokens_BT: torch.Tensor | None) -> list[Coded]:
        exact = (Distortion(0.0, 0.0),)
        return [Coded((bytes_of(k_LHTD, v_LHTD),), exact) for k_LHTD, v_LHTD in zip(k_BLHTD, v_BLHTD, strict=True)]

    def _decode(self, blocks: Sequence[Stored], tokens_BT: torch.Tensor | None, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor) -> None:
        lay = self.layout
        for block, *outs_LHTD in zip(blocks, k_BLHTD, v_BLHTD, strict=True):
            data = tensor_from_buffer(block.layers[0], k_BLHTD.device)
            both_LKHTX = data.view(lay.layers, 2, lay.kv_heads, block.tokens, -1)
            for i, out_LHTD in enumerate(outs_LHTD):
                out_LHTD.view(torch.uint8).copy_(both_LKHTX[:, i])

    def _layer_bytes(self, start: int, tokens: int) -> tuple[int, ...]:
        return (self.layout.bytes_per_token * tokens,)
