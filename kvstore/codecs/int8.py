"""``int8``: eight bits a value. Needs no calibration, hurts nothing, and decodes at a good part of a copy's speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from kvstore.block import Distortion

from .base import Coded, relative
from .parallel import spread
from .scaled import ScaledByteCodec
from .scales import groups_of, largest_scale


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
    def _native_decode() -> Callable[..., bool]:
        from .kernels import decode_int8

        return decode_int8

    @staticmethod
    def _to_codes(x: torch.Tensor) -> torch.Tensor:
        return x.round().to(torch.int8)

    @staticmethod
    def _from_codes(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return codes.view(torch.int8)

    def _encode_on_cpu(self, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor, starts: Sequence[int]) -> list[Coded]:
        return spread(lambda pair: self._encode_block(*pair), zip(k_BLHTD, v_BLHTD, strict=True))

    def _encode_block(self, k_LHTD: torch.Tensor, v_LHTD: torch.Tensor) -> Coded:
        from .floats import view_of
        from .kernels import encode_int8

        dim, groups, dtype = self.layout.head_dim, groups_of(self.layout.head_dim), self.layout.dtype
        rows, most = k_LHTD.numel() // dim // self.layout.layers, np.float32(largest_scale(dtype, self.top))
        payload = bytearray(sum(self._layer_bytes(0, k_LHTD.shape[2])))
        data = np.frombuffer(payload, np.uint8).reshape(self.layout.layers, -1)
        errors = []
        for i, x_LHTD in enumerate((k_LHTD, v_LHTD)):
            values = view_of(x_LHTD.contiguous()).reshape(-1)
            error = energy = 0.0
            for layer, row in enumerate(data):
                scales = row[2 * rows * groups * i :][: 2 * rows * groups].view(np.int16 if dtype == torch.float16 else np.uint16)
                codes = row[4 * rows * groups + rows * dim * i :][: rows * dim]
                part = encode_int8(values[layer * rows * dim :][: rows * dim], rows, dim, groups, most, scales, codes)
                error, energy = error + part[0], energy + part[1]
            errors.append(relative(error, energy))
        return Coded((memoryview(payload).toreadonly(),), (Distortion(*errors),))
