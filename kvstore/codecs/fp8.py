"""``fp8``: eight-bit floats (E4M3, OCP 8-bit Floating Point Specification 1.0), the format of accelerators' own KV caches."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .scaled import ScaledByteCodec


class Fp8Codec(ScaledByteCodec):
    """``e4m3(x / s)`` with ``s = max|x| / 448`` per token, head and 64 channels: no scale to calibrate, so none to get wrong."""

    name = "fp8"
    wire_id = 5
    worst_error = 1 / 16
    top = 448.0

    @staticmethod
    def _native_decode() -> Callable[..., bool]:
        from .kernels import decode_fp8

        return decode_fp8

    @staticmethod
    def _are_finite(codes: torch.Tensor) -> torch.Tensor:
        return ((codes & 0x7F) != 0x7F).all()

    @staticmethod
    def _to_codes(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.float8_e4m3fn)

    @staticmethod
    def _from_codes(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return codes.view(torch.float8_e4m3fn).to(dtype)
