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

from .base import Coded, Stored, all_finite, relative_error
from .batched import BatchedCodec, squares
from .memory import bytes_of
from .parallel import spread
from .scales import divided, groups_of, largest_scale, round_up, scale_dtype


class ScaledByteCodec(BatchedCodec):
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
    def _are_finite(codes: torch.Tensor) -> torch.Tensor | None:
        """Whether no uint8 code stands for NaN, bool []; None where none can."""
        return None

    def _encode_on_cpu(self, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor, starts: Sequence[int]) -> list[Coded]:
        coded = []
        for both_LHTD in zip(k_BLHTD, v_BLHTD, strict=True):
            (k_scale, k_codes, k_decoded), (v_scale, v_codes, v_decoded) = (self._quantize(x_LHTD) for x_LHTD in both_LHTD)
            pairs = zip(both_LHTD, (k_decoded, v_decoded), strict=True)
            errors = [relative_error(x_LHTD[None], decoded[None])[0] for x_LHTD, decoded in pairs]
            coded.append(Coded((bytes_of(k_scale, v_scale, k_codes, v_codes),), (Distortion(*errors),)))
        return coded

    def _quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scales [..., G, 1], codes [..., G, D/G] and what they decode to [..., G, D/G], of values [..., D]."""
        dtype = x.dtype
        x = x.unflatten(-1, (groups_of(x.shape[-1]), -1))
        low, high = x.aminmax(dim=-1, keepdim=True)
        scale = round_up(divided(torch.maximum(high, -low).float(), self.top), scale_dtype(dtype)).clamp_max(largest_scale(dtype, self.top))
        ratio = x.float() / torch.where(scale > 0, scale, 1).float()
        codes = self._to_codes(ratio.clamp(-self.top, self.top))
        decoded = torch.empty_like(x, memory_format=torch.contiguous_format)
        torch.mul(self._from_codes(codes.view(torch.uint8), dtype), scale.to(dtype), out=decoded)
        return scale, codes, decoded

    def _decode_on_cpu(self, blocks: Sequence[Stored], k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor) -> None:
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

    def _encode_pass(self, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        both_BLKHTD = torch.stack((k_BLHTD, v_BLHTD), 2)
        scale, codes, decoded = self._quantize(both_BLKHTD)
        sums = [squares(x, y) for x, y in zip(both_BLKHTD.unbind(2), decoded.flatten(-2).unbind(2), strict=True)]
        payloads = torch.cat([x.flatten(2).view(torch.int16) for x in (scale, codes)], 2)  # half as many elements as bytes
        return payloads.flatten(1).view(torch.uint8), torch.stack(sums, 1)

    def _decode_pass(self, payloads: torch.Tensor, start: int, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor) -> torch.Tensor:
        lay, (blocks, layers, heads, tokens, dim) = self.layout, k_BLHTD.shape
        groups = groups_of(dim)
        scale_count = 2 * heads * tokens * groups
        data = payloads.view(blocks, layers, -1)
        scales = data.view(torch.int16)[:, :, :scale_count].view(scale_dtype(lay.dtype))
        codes = data[:, :, 2 * scale_count :]
        checks = [all_finite(scales), self._are_finite(codes)]
        scales = scales.to(lay.dtype).unflatten(2, (2, heads, tokens, groups, 1))
        codes = codes.unflatten(2, (2, heads, tokens, groups, dim // groups))
        for i, out in enumerate((k_BLHTD, v_BLHTD)):
            torch.mul(self._from_codes(codes[:, :, i], lay.dtype), scales[:, :, i], out=out.unflatten(-1, (groups, -1)))
        return torch.stack([check for check in checks if check is not None]).all()

    def _layer_bytes(self, start: int, tokens: int) -> tuple[int, ...]:
        lay = self.layout
        return (2 * lay.layers * lay.kv_heads * tokens * (lay.head_dim + 2 * groups_of(lay.head_dim)),)
