"""``int8``: eight bits a value, one scale for each token, head and 64 channels. Needs no calibration and hurts nothing.

Symmetric: ``q = round(x / s)`` with ``s = max|x| / 127`` kept in bfloat16, rounded up so that nothing is clipped.

Payload, for each model layer: scales of K [H, T, G] bfloat16, scales of V, then K [H, T, D] int8, V.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvstore.block import Distortion

from .base import Codec, Coded, Stored, relative_error
from .memory import tensor_from_buffer
from .scales import bfloat16_up, groups_of

_TOP = 127


class Int8Codec(Codec):
    """Symmetric int8 per token and head."""

    name = "int8"
    wire_id = 2

    def _encode(self, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor, starts: Sequence[int], tokens_BT: torch.Tensor | None) -> list[Coded]:
        coded = []
        for k_LHTD, v_LHTD in zip(k_BLHTD, v_BLHTD, strict=True):
            sections, errors = [], []
            for x_LHTD in (k_LHTD, v_LHTD):
                scale, q = _quantize(x_LHTD)
                sections.append((scale, q))
                errors.append(relative_error(x_LHTD[None], _dequantize(scale, q).to(x_LHTD.dtype)[None])[0])
            (k_scale, k_q), (v_scale, v_q) = sections
            rows = [t.contiguous().view(torch.uint8).flatten(1) for t in (k_scale, v_scale, k_q, v_q)]
            coded.append(Coded((torch.cat(rows, 1).cpu().numpy().tobytes(),), (Distortion(*errors),)))
        return coded

    def _decode(self, blocks: Sequence[Stored], tokens_BT: torch.Tensor | None, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor) -> None:
        lay = self.layout
        heads, dim, groups = lay.kv_heads, lay.head_dim, groups_of(lay.head_dim)
        for block, k_LHTD, v_LHTD in zip(blocks, k_BLHTD, v_BLHTD, strict=True):
            data = tensor_from_buffer(block.layers[0], k_BLHTD.device).view(lay.layers, -1)
            scale_bytes = 2 * heads * block.tokens * groups
            parts = data.split([scale_bytes, scale_bytes] + [heads * block.tokens * dim] * 2, 1)
            for out, scale, q in ((k_LHTD, parts[0], parts[2]), (v_LHTD, parts[1], parts[3])):
                scale = scale.contiguous().view(torch.bfloat16).view(lay.layers, heads, block.tokens, groups, 1)
                q = q.view(torch.int8).view(lay.layers, heads, block.tokens, groups, -1)
                out.copy_(_dequantize(scale, q).view(out.shape))

    def _layer_bytes(self, start: int, tokens: int) -> tuple[int, ...]:
        lay = self.layout
        return (2 * lay.layers * lay.kv_heads * tokens * (lay.head_dim + 2 * groups_of(lay.head_dim)),)


def _quantize(x_LHTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x_LHTD.float().unflatten(-1, (groups_of(x_LHTD.shape[-1]), -1))
    scale = bfloat16_up(x.abs().amax(-1, keepdim=True) / _TOP)
    q = (x / scale.float().clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(-_TOP, _TOP)
    return scale, q.to(torch.int8)


def _dequantize(scale: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (q.float() * scale.float()).flatten(-2)
