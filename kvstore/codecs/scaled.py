"""One byte a value and one scale for each token, head and 64 channels: what ``int8`` and ``fp8`` share.

Payload, for each model layer: scales of K [H, T, G] in 16 bits, scales of V, then codes of K [H, T, D], codes of V.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from kvstore.block import Distortion
from kvstore.errors import CorruptBlockError

from .base import Codec, Coded, Stored, is_finite, relative_error
from .memory import bytes_of, tensor_from_buffer, wide
from .parallel import spread
from .scales import groups_of, largest_scale, round_up, scale_dtype


class ScaledByteCodec(Codec):
    """Template: a subclass names its largest code and converts between float32 and codes."""

    #: Largest magnitude that a code stands for.
    top: ClassVar[float]

    @staticmethod
    @abstractmethod
    def _native_decode() -> Callable[..., bool]:
        """The loop of `kernels` that decodes on the CPU."""

    @staticmethod
    @abstractmethod
    def _to_codes(x: torch.Tensor) -> torch.Tensor:
        """The nearest code, one byte each, of float32 values within ±`top`."""

    @staticmethod
    @abstractmethod
    def _from_codes(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What uint8 `codes` stand for, in a type that multiplies into `dtype` without loss."""

    @staticmethod
    def _are_finite(codes: torch.Tensor) -> bool:
        """Whether no uint8 code stands for NaN."""
        return True

    def _encode(self, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor, starts: Sequence[int], tokens_BT: torch.Tensor | None) -> list[Coded]:
        coded = []
        for k_LHTD, v_LHTD in zip(k_BLHTD, v_BLHTD, strict=True):
            k_scale, k_codes, k_error = self._quantize(k_LHTD)
            v_scale, v_codes, v_error = self._quantize(v_LHTD)
            coded.append(Coded((bytes_of(k_scale, v_scale, k_codes, v_codes),), (Distortion(k_error, v_error),)))
        return coded

    def _quantize(self, x_LHTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Scales [L, H, T, G, 1], codes [L, H, T, G, D/G], and the relative squared error of both together."""
        dtype = x_LHTD.dtype
        x = x_LHTD.unflatten(-1, (groups_of(x_LHTD.shape[-1]), -1))
        low, high = x.aminmax(dim=-1, keepdim=True)
        scale = round_up(torch.maximum(high, -low).float() / self.top, scale_dtype(dtype)).clamp_max(largest_scale(dtype, self.top))
        ratio = x.float() / torch.where(scale > 0, scale, 1).float()
        codes = self._to_codes(ratio.clamp(-self.top, self.top))
        decoded = torch.empty_like(x, memory_format=torch.contiguous_format)
        torch.mul(self._from_codes(codes.view(torch.uint8), dtype), scale.to(dtype), out=decoded)
        return scale, codes, relative_error(x[None], decoded[None])[0]

    def _decode(self, blocks: Sequence[Stored], tokens_BT: torch.Tensor | None, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor) -> None:
        if k_BLHTD.device.type == "cpu":
            self._decode_native(blocks, k_BLHTD, v_BLHTD)
        else:
            self._decode_torch(blocks, k_BLHTD, v_BLHTD)

    def _decode_native(self, blocks: Sequence[Stored], k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor) -> None:
        from .floats import elements

        dim, groups, decode = self.layout.head_dim, groups_of(self.layout.head_dim), self._native_decode()
        rows = self.layout.kv_heads * blocks[0].tokens
        layer_bytes = rows * (2 * dim + 4 * groups)
        tasks: list[partial[Any]] = []
        for i, out_BLHTD in enumerate((k_BLHTD, v_BLHTD)):
            cache = elements(out_BLHTD)
            places = 2 * rows * groups * i, 4 * rows * groups + rows * dim * i
            for block, out in zip(blocks, out_BLHTD, strict=True):
                data = np.frombuffer(block.layers[0], np.uint8)
                target = cache, out.storage_offset(), out.stride()
                tasks.append(partial(decode, data, layer_bytes, *places, tuple(out.shape), groups, *target))
        if not all(spread(lambda task: task(), tasks)):
            raise CorruptBlockError(f"a number of this {self.name!r} block is not finite")

    def _decode_torch(self, blocks: Sequence[Stored], k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor) -> None:
        lay = self.layout
        groups = groups_of(lay.head_dim)
        rows = lay.kv_heads * blocks[0].tokens
        shape = (lay.layers, lay.kv_heads, blocks[0].tokens, groups, lay.head_dim // groups)
        for block, *outs_LHTD in zip(blocks, k_BLHTD, v_BLHTD, strict=True):
            data = tensor_from_buffer(block.layers[0], k_BLHTD.device).view(lay.layers, -1)
            scale_bytes, codes = data.split([4 * rows * groups, 2 * rows * lay.head_dim], 1)
            scales = wide(scale_bytes, scale_dtype(lay.dtype), lay.layers, 2, *shape[1:4], 1)
            if not is_finite(scales) or not self._are_finite(codes):
                raise CorruptBlockError(f"a number of this {self.name!r} block is not finite")
            scales = scales.to(lay.dtype)
            for i, (out_LHTD, part) in enumerate(zip(outs_LHTD, codes.split(rows * lay.head_dim, 1), strict=True)):
                torch.mul(self._from_codes(part.view(shape), lay.dtype), scales[:, i], out=out_LHTD.unflatten(-1, shape[3:]))

    def _layer_bytes(self, start: int, tokens: int) -> tuple[int, ...]:
        lay = self.layout
        return (2 * lay.layers * lay.kv_heads * tokens * (lay.head_dim + 2 * groups_of(lay.head_dim)),)
