"""``raw``: the values themselves, bit for bit in the layout's dtype. The yardstick of every other codec.

Payload: for each model layer, K then V, row-major [H, T, D].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvstore.block import Distortion

from .base import Coded, Stored
from .batched import BatchedCodec
from .memory import bytes_of, tensor_from_buffer


class RawCodec(BatchedCodec):
    """No compression, no loss."""

    name = "raw"
    wire_id = 1
    worst_error = 0.0

    def _encode_on_cpu(self, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor, starts: Sequence[int]) -> list[Coded]:
        exact = (Distortion(0.0, 0.0),)
        return [Coded((bytes_of(k_LHTD, v_LHTD),), exact) for k_LHTD, v_LHTD in zip(k_BLHTD, v_BLHTD, strict=True)]

    def _decode_on_cpu(self, blocks: Sequence[Stored], k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor) -> None:
        lay = self.layout
        for block, *outs_LHTD in zip(blocks, k_BLHTD, v_BLHTD, strict=True):
            data = tensor_from_buffer(block.layers[0])
            both_LKHTX = data.view(lay.layers, 2, lay.kv_heads, block.tokens, -1)
            for i, out_LHTD in enumerate(outs_LHTD):
                out_LHTD.view(torch.uint8).copy_(both_LKHTX[:, i])

    def _encode_pass(self, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        both_BLKHTD = torch.stack((k_BLHTD, v_BLHTD), 2)
        return both_BLKHTD.flatten(1).view(torch.uint8), torch.zeros(len(k_BLHTD), 2, 2, device=k_BLHTD.device)

    def _decode_pass(self, payloads: torch.Tensor, start: int, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor) -> torch.Tensor:
        lay = self.layout
        both_BLKHTD = payloads.view(lay.dtype).view(len(payloads), lay.layers, 2, *k_BLHTD.shape[2:])
        k_BLHTD.copy_(both_BLKHTD[:, :, 0])
        v_BLHTD.copy_(both_BLKHTD[:, :, 1])
        return torch.ones((), dtype=torch.bool, device=payloads.device)

    def _layer_bytes(self, start: int, tokens: int) -> tuple[int, ...]:
        return (self.layout.bytes_per_token * tokens,)
