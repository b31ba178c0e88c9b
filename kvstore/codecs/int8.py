"""``int8``: eight bits a value. Needs no calibration, hurts nothing, and decodes at a good part of a copy's speed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from kvstore.block import Distortion
from kvstore.errors import CorruptBlockError

from .base import Coded, Stored, relative
from .scaled import ScaledByteCodec
from .scales import groups_of


class Int8Codec(ScaledByteCodec):
    """Symmetric: ``q = round(x / s)``, ``s = max|x| / 127`` per token, head and 64 channels, rounded up so that nothing is clipped.

    Whole numbers up to 127 are exact in bfloat16 and float16, so code × scale is one correctly rounded product. On the CPU native
    loops do the work (`kernels.py`); other devices run the template's torch code.
    """

    name = "int8"
    wire_id = 2
    worst_error = 1 / 127
    top = 127.0

    @staticmethod
    def _to_codes(x: torch.Tensor) -> torch.Tensor:
        return x.round().to(torch.int8)

    @staticmethod
    def _from_codes(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return codes.view(torch.int8)

    def _encode(self, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor, starts: Sequence[int], tokens_BT: torch.Tensor | None) -> list[Coded]:
        if k_BLHTD.device.type != "cpu":
            return super()._encode(k_BLHTD, v_BLHTD, starts, tokens_BT)
        from .kernels import run_all

        return run_all([partial(self._encode_block, *pair) for pair in zip(k_BLHTD, v_BLHTD, strict=True)])

    def _encode_block(self, k_LHTD: torch.Tensor, v_LHTD: torch.Tensor) -> Coded:
        from .kernels import encoder, flat_bits

        dim, groups, encode = self.layout.head_dim, groups_of(self.layout.head_dim), encoder(self.layout.dtype)
        rows = k_LHTD.numel() // dim // self.layout.layers
        payload = bytearray(sum(self._layer_bytes(0, k_LHTD.shape[2])))
        data = np.frombuffer(payload, np.uint8).reshape(self.layout.layers, -1)
        errors = []
        for i, x_LHTD in enumerate((k_LHTD, v_LHTD)):
            dense = x_LHTD.contiguous()
            bits = flat_bits(dense)[dense.storage_offset() :]
            error = energy = 0.0
            for layer, row in enumerate(data):
                scales = row[2 * rows * groups * i :][: 2 * rows * groups].view(np.uint16)
                codes = row[4 * rows * groups + rows * dim * i :][: rows * dim]
                part = encode(bits[layer * rows * dim :][: rows * dim], rows, dim, groups, scales, codes)
                error, energy = error + part[0], energy + part[1]
            errors.append(relative(error, energy))
        return Coded((memoryview(payload).toreadonly(),), (Distortion(*errors),))

    def _decode(self, blocks: Sequence[Stored], tokens_BT: torch.Tensor | None, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor) -> None:
        if k_BLHTD.device.type != "cpu":
            return super()._decode(blocks, tokens_BT, k_BLHTD, v_BLHTD)
        from .kernels import decoder, flat_bits, run_all

        dim, groups, decode = self.layout.head_dim, groups_of(self.layout.head_dim), decoder(self.layout.dtype)
        rows = self.layout.kv_heads * blocks[0].tokens
        layer_bytes = rows * (2 * dim + 4 * groups)
        tasks = []
        for i, out_BLHTD in enumerate((k_BLHTD, v_BLHTD)):
            bits = flat_bits(out_BLHTD)
            places = 2 * rows * groups * i, 4 * rows * groups + rows * dim * i
            for block, out in zip(blocks, out_BLHTD, strict=True):
                data = np.frombuffer(block.layers[0], np.uint8)
                target = bits, out.storage_offset(), out.stride()
                tasks.append(partial(decode, data, layer_bytes, *places, tuple(out.shape), groups, *target))
        if not all(run_all(tasks)):
            raise CorruptBlockError(f"a scale of this {self.name!r} block is not finite")
        return None
