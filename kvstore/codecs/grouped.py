"""Few bits a value in affine groups: what ``int4`` and ``int2`` share.

After KIVI (arXiv 2402.02750): outliers of K stay in their channels, so K is grouped along tokens; those of V stay in their tokens, so
V is grouped along channels. Beyond KIVI: the sequence's first token, an attention sink that the rest cannot do without, stays exact,
and a group's offset and scale may be fitted by least squares instead of spanning its range.

Payload, for each model layer: the exact first token of K and of V [H, A, D] in the layout's dtype (A = 1 where the block starts the
sequence, else 0); offset and scale of K [2, H, N, D] bfloat16, of V [2, H, T-A, G]; codes of K [H, T-A, P], codes of V. A byte of the
P = ceil(D·bits/8) holds channels p, p + P, … from its low bits up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import ClassVar

import numpy as np
import torch

from kvstore.block import Distortion
from kvstore.errors import CorruptBlockError

from .base import Coded, Stored, all_finite, is_finite, relative_error
from .batched import BatchedCodec, squares
from .memory import bytes_of, rows_of, tensor_from_buffer, wide
from .parallel import spread
from .scales import divided, round_down, round_up

Fit = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
#: Of offsets and scales, whatever the cache's dtype: a rotated value may lie outside float16.
_FIT_DTYPE = torch.bfloat16


class GroupedCodec(BatchedCodec):
    """Template: a subclass names its bits, the size of its groups and how often to refit them."""

    bits: ClassVar[int]
    #: Tokens (of K) or channels (of V) that share an offset and a scale.
    group: ClassVar[int]
    #: Least-squares refits of offset and scale; the best of all tries is kept.
    refits: ClassVar[int]
    #: Rotate V by a Hadamard matrix first, which makes its channels alike (QuaRot, arXiv 2404.00456, §4).
    rotate_values: ClassVar[bool] = False

    def _encode_on_cpu(self, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor, starts: Sequence[int]) -> list[Coded]:
        coded = []
        for k_LHTD, v_LHTD, start in zip(k_BLHTD, v_BLHTD, starts, strict=True):
            parts, decoded = self._parts(k_LHTD, v_LHTD, _exact_tokens(start), self._fit)
            errors = relative_error(torch.stack((k_LHTD, v_LHTD)), torch.stack(decoded))
            coded.append(Coded((bytes_of(*parts),), (Distortion(*errors),)))
        return coded

    def _parts(
        self, k_LHTD: torch.Tensor, v_LHTD: torch.Tensor, exact: int, fit: Fit
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, torch.Tensor]]:
        """The payload's parts [L, …] in its order, and K and V as they decode. L may count the layers of several blocks."""
        k_fit, k_codes = fit(self._by_channel(k_LHTD[:, :, exact:]))
        v_fit, v_codes = fit(self._by_token(self._rotated(v_LHTD[:, :, exact:])))
        tokens = k_LHTD.shape[2]
        k_codes = k_codes.transpose(-1, -2).flatten(2, 3)[:, :, : tokens - exact]
        v_codes = v_codes.flatten(-2)
        k, v = (x.clone(memory_format=torch.contiguous_format) for x in (k_LHTD, v_LHTD))
        if tokens > exact:
            self._restore(k[:, :, exact:], k_fit, k_codes, by_channel=True)
            self._restore(v[:, :, exact:], v_fit, v_codes, by_channel=False)
        return (k_LHTD[:, :, :exact], v_LHTD[:, :, :exact], k_fit, v_fit, pack(k_codes, self.bits), pack(v_codes, self.bits)), (k, v)

    def _encode_pass(self, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        parts, decoded = self._parts(k_BLHTD.flatten(0, 1), v_BLHTD.flatten(0, 1), _exact_tokens(start), self._fit_on(k_BLHTD.device))
        pairs = zip((k_BLHTD, v_BLHTD), decoded, strict=True)
        return rows_of(*parts).view(len(k_BLHTD), -1), torch.stack([squares(x, y.view(x.shape)) for x, y in pairs], 1)

    def _decode_on_cpu(self, blocks: Sequence[Stored], k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor) -> None:
        def one(block_and_outs: tuple[Stored, torch.Tensor, torch.Tensor]) -> None:
            block, *outs_LHTD = block_and_outs
            for i, out_LHTD in enumerate(outs_LHTD):
                self._decode_part(block, i, out_LHTD)

        spread(one, zip(blocks, k_BLHTD, v_BLHTD, strict=True))

    def _decode_part(self, block: Stored, i: int, out_LHTD: torch.Tensor) -> None:
        """Decode K (`i` 0) or V (1) of one block."""
        lay = self.layout
        exact, rest = _exact_tokens(block.start), block.tokens - _exact_tokens(block.start)
        sizes = self._section_bytes(block.start, block.tokens)
        data = tensor_from_buffer(block.layers[0]).view(lay.layers, -1).split(sizes, 1)
        out_LHTD[:, :, :exact] = wide(data[i], lay.dtype, lay.layers, lay.kv_heads, exact, lay.head_dim)
        if not rest:
            return
        fit = wide(data[2 + i], _FIT_DTYPE, lay.layers, 2, lay.kv_heads, *self._groups(rest, by_channel=i == 0))
        if not is_finite(fit):
            raise CorruptBlockError(f"an offset or scale of this {self.name!r} block is not finite")
        self._restore_native(out_LHTD[:, :, exact:], fit, block.layers[0], sum(sizes[: 4 + i]), by_channel=i == 0)

    def _decode_pass(self, payloads: torch.Tensor, start: int, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor) -> torch.Tensor:
        lay, (blocks, layers, heads, tokens, dim) = self.layout, k_BLHTD.shape
        exact, rest, many = _exact_tokens(start), tokens - _exact_tokens(start), blocks * layers
        data = payloads.view(many, -1).split(self._section_bytes(start, tokens), 1)
        intact = torch.ones((), dtype=torch.bool, device=payloads.device)
        for i, out_BLHTD in enumerate((k_BLHTD, v_BLHTD)):
            out_BLHTD[:, :, :, :exact] = wide(data[i], lay.dtype, blocks, layers, heads, exact, dim)
            if rest:
                fit = wide(data[2 + i], _FIT_DTYPE, many, 2, heads, *self._groups(rest, by_channel=i == 0))
                codes = unpack(data[4 + i].unflatten(1, (heads, rest, -1)), self.bits, dim)
                self._restore(out_BLHTD[:, :, :, exact:], fit, codes, by_channel=i == 0)
                intact &= all_finite(fit)
        return intact

    def _restore_native(self, out_LHTD: torch.Tensor, fit: torch.Tensor, payload: memoryview, codes_at: int, *, by_channel: bool) -> None:
        """`_restore` in one native pass, from packed codes that start at `codes_at` in each layer of the payload."""
        from .floats import elements
        from .kernels import decode_affine

        dim, largest = self.layout.head_dim, np.float32(torch.finfo(out_LHTD.dtype).max)
        data = np.frombuffer(payload, np.uint8)
        size = dim & -dim if self.rotate_values and not by_channel else 1
        decode_affine(
            data, len(data) // self.layout.layers, codes_at, fit.float().numpy(), self.group, by_channel, self.bits, size, largest,
            elements(out_LHTD), out_LHTD.storage_offset(), out_LHTD.stride(), tuple(out_LHTD.shape),
        )  # fmt: skip

    @property
    def _channel_groups(self) -> int:
        """Groups of channels in a head of V; one where `group` does not divide the head."""
        return self.layout.head_dim // self.group if self.layout.head_dim % self.group == 0 else 1

    def _groups(self, rest: int, *, by_channel: bool) -> tuple[int, int]:
        """[N, D] of K or [T, G] of V: which groups of `rest` tokens have an offset and a scale."""
        return (-(-rest // self.group), self.layout.head_dim) if by_channel else (rest, self._channel_groups)

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        """`x` through the symmetric orthogonal matrix of `rotate_values`, which undoes itself."""
        return x.float() @ hadamard_on(x.device, x.shape[-1]) if self.rotate_values else x

    def _by_channel(self, x_LHTD: torch.Tensor) -> torch.Tensor:
        """K as groups of tokens [L, H, N, D, group]; a last short group is filled up with its last token."""
        missing = -x_LHTD.shape[2] % self.group
        x = torch.cat((x_LHTD, x_LHTD[:, :, -1:].expand(-1, -1, missing, -1)), 2)
        return x.unflatten(2, (x.shape[2] // self.group, self.group)).transpose(-1, -2)

    def _by_token(self, x_LHTD: torch.Tensor) -> torch.Tensor:
        """V as groups of channels [L, H, T, G, D/G]."""
        return x_LHTD.unflatten(-1, (self._channel_groups, -1))

    def _fit_on(self, device: torch.device) -> Fit:
        """`_fit`, on CUDA in one kernel."""
        if device.type != "cuda" or find_spec("triton") is None:
            return self._fit
        from .triton_fit import fit

        return lambda x: fit(x, self.bits, self.refits) if x.numel() else self._fit(x)

    def _fit(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Offset and scale [L, 2, …] and uint8 codes like `x`, for groups in the last dimension of `x` [L, …, n], fitted in float32."""
        x, top, dtype = x.float(), 2**self.bits - 1, _FIT_DTYPE
        if not x.numel():
            return torch.zeros(x.shape[0], 2, *x.shape[1:-1], dtype=dtype, device=x.device), x.to(torch.uint8)
        offset = round_down(x.amin(-1, keepdim=True), dtype)
        scale = round_up(divided(x.amax(-1, keepdim=True), top) - divided(offset.float(), top), dtype).clamp_max(torch.finfo(dtype).max)
        codes = _codes(x, offset, scale, top)
        if self.refits:
            best = _error(x, offset, scale, codes)
        for _ in range(self.refits):
            new_offset, new_scale = (t.to(dtype) for t in _least_squares(x, codes))
            new_codes = _codes(x, new_offset, new_scale, top)
            error = _error(x, new_offset, new_scale, new_codes)
            better = error < best  # False for NaN, so a fit that overflowed is never taken
            offset, scale = torch.where(better, new_offset, offset), torch.where(better, new_scale, scale)
            codes, best = torch.where(better, new_codes, codes), torch.where(better, error, best)
        return torch.stack((offset, scale), 1).squeeze(-1), codes.to(torch.uint8)

    def _restore(self, out: torch.Tensor, fit: torch.Tensor, codes_LHTD: torch.Tensor, *, by_channel: bool) -> None:
        """Write offset + scale × code, computed in float32, into `out` [L, H, T, D]; for several blocks' layers into [B, L, H, T, D]."""
        rest, (offset, scale) = codes_LHTD.shape[2], fit.float().unbind(1)
        if by_channel:
            offset, scale = (t.repeat_interleave(self.group, 2)[:, :, :rest] for t in (offset, scale))
            x = torch.addcmul(offset, codes_LHTD.float(), scale)
        else:
            x = torch.addcmul(offset[..., None], codes_LHTD.unflatten(-1, (self._channel_groups, -1)).float(), scale[..., None])
            x = self._rotated(x.flatten(-2))
        largest = torch.finfo(out.dtype).max
        out.copy_(x.clamp_(-largest, largest).view(out.shape))

    def _section_bytes(self, start: int, tokens: int) -> list[int]:
        """Bytes of each part of one model layer, in the payload's order."""
        lay, exact = self.layout, _exact_tokens(start)
        rest = tokens - exact
        first = lay.kv_heads * exact * lay.head_dim * lay.dtype.itemsize
        k_fit = 4 * lay.kv_heads * -(-rest // self.group) * lay.head_dim
        v_fit = 4 * lay.kv_heads * rest * self._channel_groups
        codes = lay.kv_heads * rest * packed_bytes(lay.head_dim, self.bits)
        return [first, first, k_fit, v_fit, codes, codes]

    def _layer_bytes(self, start: int, tokens: int) -> tuple[int, ...]:
        return (self.layout.layers * sum(self._section_bytes(start, tokens)),)


def _exact_tokens(start: int) -> int:
    return 1 if start == 0 else 0


def _codes(x: torch.Tensor, offset: torch.Tensor, scale: torch.Tensor, top: int) -> torch.Tensor:
    """Nearest codes as float32. Divided before the subtraction, which could overflow."""
    step = torch.where(scale > 0, scale, 1).float()
    return (x / step - offset.float() / step).round_().clamp_(0, top)


def _error(x: torch.Tensor, offset: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return (torch.addcmul(offset.float(), codes, scale.float()) - x).square().sum(-1, keepdim=True)


def _least_squares(x: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Offset and scale that fit `x` best for the codes as they are."""
    x_mean, code_mean = x.mean(-1, keepdim=True), codes.mean(-1, keepdim=True)
    spread = codes - code_mean
    scale = ((x - x_mean) * spread).mean(-1, keepdim=True) / spread.square().mean(-1, keepdim=True).clamp_min(1e-12)
    return x_mean - scale * code_mean, scale


@cache
def hadamard(channels: int) -> torch.Tensor:
    """Symmetric orthogonal float32 [D, D]: Sylvester's matrix over the largest power of two that divides D, repeated along the diagonal."""
    size = channels & -channels
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return torch.block_diag(*[matrix / size**0.5] * (channels // size))


@cache
def hadamard_on(device: torch.device, channels: int) -> torch.Tensor:
    """`hadamard` on `device`, where it stays: a copy of it would wait for the device each time."""
    return hadamard(channels).to(device)


def packed_bytes(channels: int, bits: int) -> int:
    return -(-channels * bits // 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [..., D] below 2**bits as bytes [..., P]."""
    planes, width = 8 // bits, packed_bytes(codes.shape[-1], bits)
    padded = torch.nn.functional.pad(codes, (0, planes * width - codes.shape[-1])).unflatten(-1, (planes, width))
    packed = padded[..., 0, :].clone()
    for i in range(1, planes):
        packed |= padded[..., i, :] << (bits * i)
    return packed


def unpack(packed: torch.Tensor, bits: int, channels: int) -> torch.Tensor:
    """The inverse of `pack`: uint8 codes [..., D]."""
    planes = [(packed >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
    return torch.cat(planes, -1)[..., :channels]
