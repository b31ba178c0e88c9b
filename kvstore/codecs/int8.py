"""``int8``: eight bits a value. Needs no calibration, hurts nothing, and decodes at nearly the speed of a copy."""

from __future__ import annotations

import torch

from .scaled import ScaledByteCodec


class Int8Codec(ScaledByteCodec):
    """Symmetric: ``q = round(x / s)``, ``s = max|x| / 127`` per token, head and 64 channels, rounded up so that nothing is clipped.

    Whole numbers up to 127 are exact in bfloat16 and float16, so code × scale is one correctly rounded product.
    """

    name = "int8"
    wire_id = 2
    top = 127.0

    @staticmethod
    def _to_codes(x: torch.Tensor) -> torch.Tensor:
        return x.round().to(torch.int8)

    @staticmethod
    def _from_codes(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return codes.view(torch.int8)
