"""``svd``: a basis of its own for every block. It needs no calibration, and fits what no calibration has seen.

The matrix of a block, tokens × (layers, K and V, heads, channels), is decomposed as U·C, U the left singular vectors; C = Uᵀ·M is
quantized with one step everywhere, each run of it (one component, one layer, K or V) in as many bits as it needs: reverse
water-filling (Cover and Thomas, *Elements of Information Theory*, §10.3.3), which spends nothing where the energy lies under the step,
and so also picks the rank. Keys are decomposed before RoPE, which would smear their few directions over many. K and V of each layer
are brought to one scale first, so that the same *relative* error falls on each. The sequence's first token stays exact. Best with long
blocks (256 tokens), which share a basis among more tokens.

Payload, A = 1 exact token where the block starts the sequence, else 0, T' = T - A::

    rank u16 | step f32
    exact K and V [2, L, H, A, D] in the layout's dtype
    peak [L, 2] f32 | rms [L, 2] f32 | mean [L, 2, H, D] float16 | U [T', rank] float16 | widths [rank, L·2] u8
    C in runs of H·D numbers (`bits.py`)
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvstore.block import BlockHeader, Distortion
from kvstore.errors import ConfigError, CorruptBlockError

from . import bits
from .base import Codec, Coded, Stored, is_finite, relative_error
from .memory import tensor_from_buffer, wide

_HEAD = struct.Struct("<Hf")
#: Of a block of one layer of precision, which is all that the size depends on.
_HEADER_BYTES = BlockHeader(6, 1, 1, 1, 1, 0, 1, (None,), 1).header_bytes
#: A run whose standard deviation lies below this share of the step is dropped: it would cost two bits a value for next to nothing.
_DEAD_ZONE = 0.3
_BISECTIONS = 40


@dataclass(frozen=True)
class _Parts:
    """A decomposed block in numbers: x = ((U·C·step)·rms + mean)·peak, keys then rotated."""

    step: float
    peak_LK: torch.Tensor
    rms_LK: torch.Tensor
    mean_LKHD: torch.Tensor
    u_TR: torch.Tensor
    codes_RN: torch.Tensor


class SvdCodec(Codec):
    """Truncated singular value decomposition of each block, with quantized factors."""

    name = "svd"
    wire_id = 6

    @dataclass(frozen=True)
    class Config:
        """One of the two decides the rate.

        Parameters
        ----------
        ratio : float
            Bytes at 2 a value over bytes of the whole blob.
        energy : float or None
            Share of the (scaled) energy to keep instead, such as 0.99.
        """

        ratio: float = 4.0
        energy: float | None = None

        def __post_init__(self) -> None:
            if not 1.0 <= self.ratio <= 64.0:
                raise ConfigError(f"svd: ratio must lie between 1 and 64, not {self.ratio}")
            if self.energy is not None and not 0.0 < self.energy < 1.0:
                raise ConfigError(f"svd: energy must lie between 0 and 1, not {self.energy}")

    def _encode(self, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor, starts: Sequence[int], tokens_BT: torch.Tensor | None) -> list[Coded]:
        return [self._encode_block(*each) for each in zip(k_BLHTD, v_BLHTD, starts, strict=True)]

    def _encode_block(self, k_LHTD: torch.Tensor, v_LHTD: torch.Tensor, start: int) -> Coded:
        given = torch.stack((k_LHTD, v_LHTD))
        exact = 1 if start == 0 else 0
        first = given[:, :, :, :exact].contiguous()
        parts, widths = self._decompose(given[:, :, :, exact:], start + exact, first.numel() * first.itemsize)
        decoded = torch.empty_like(given)
        decoded[:, :, :, :exact] = first
        self._compose(parts, start + exact, decoded[:, :, :, exact:])
        scales = torch.stack((parts.peak_LK, parts.rms_LK))
        runs = parts.codes_RN.view(widths.size, self._run).cpu().numpy()
        payload = b"".join((
            _HEAD.pack(parts.u_TR.shape[1], parts.step), _raw(first), _raw(scales), _raw(parts.mean_LKHD), _raw(parts.u_TR),
            widths.astype(np.uint8).tobytes(), bits.pack(runs, widths.reshape(-1)),
        ))  # fmt: skip
        return Coded((payload,), (Distortion(*relative_error(given, decoded)),))

    @property
    def _run(self) -> int:
        """Numbers that share a width: one component's values in one layer's K or V."""
        return self.layout.kv_heads * self.layout.head_dim

    def _decompose(self, x_KLHTD: torch.Tensor, start: int, exact_bytes: int) -> tuple[_Parts, np.ndarray]:
        """Scale, remove RoPE and the mean, and split into U and quantized C; also the width of each run [rank, L·2]."""
        tokens = x_KLHTD.shape[3]
        x_LKHTD = x_KLHTD.float().transpose(0, 1)
        flat = x_LKHTD.flatten(2)
        peak = flat.abs().amax(-1) if tokens else flat.new_zeros(flat.shape[:2])
        peak = torch.where(peak > 0, peak, 1.0)  # scaled first: nothing below can overflow
        y = x_LKHTD / peak[..., None, None, None]
        y[:, 0] = self._rotate(y[:, 0], start, inverse=True)
        mean = y.sum(3).div(max(tokens, 1)).half()
        y = y - mean.float()[..., None, :]
        rms = y.square().flatten(2).sum(-1).div(max(flat.shape[-1], 1)).sqrt()
        rms = torch.where(rms > 0, rms, 1.0)
        m_TN = (y / rms[..., None, None, None]).permute(3, 0, 1, 2, 4).reshape(tokens, 2 * self.layout.layers * self._run)
        u_TR = torch.linalg.eigh(m_TN @ m_TN.T)[1].flip(1).half() if tokens else m_TN.new_zeros(0, 0).half()
        c_RN = u_TR.float().T @ m_TN
        fixed = _HEAD.size + _HEADER_BYTES + exact_bytes + 8 * peak.numel() + 2 * mean.numel()
        raw_bytes = self.layout.raw_bytes(tokens + (1 if exact_bytes else 0))
        step, widths = self._water_fill(c_RN, tokens, raw_bytes / self.config.ratio - fixed)
        codes = (c_RN / step).round_().view(widths.size, self._run)
        codes = torch.where(torch.from_numpy(widths.reshape(-1, 1) > 0).to(codes.device), codes, 0.0).to(torch.int16)
        rank = int(np.flatnonzero(widths.any(1)).max(initial=-1)) + 1
        parts = _Parts(step, peak, rms, mean, u_TR[:, :rank].contiguous(), codes.view(tokens, m_TN.shape[1])[:rank])
        return parts, widths[:rank]

    def _water_fill(self, c_RN: torch.Tensor, tokens: int, budget_bytes: float) -> tuple[float, np.ndarray]:
        """The smallest step whose U, widths and codes fit the budget (or the largest that keeps the energy), and the runs' widths."""
        runs = c_RN.view(c_RN.shape[0], 2 * self.layout.layers, self._run)
        if not runs.numel():
            return 1.0, np.zeros((0, 2 * self.layout.layers), np.int64)
        peaks = runs.abs().amax(-1).double().cpu().numpy()
        deviations = runs.square().mean(-1).sqrt().double().cpu().numpy()
        def widths_at(step: float) -> np.ndarray:
            return np.where(deviations < _DEAD_ZONE * step, 0, bits.width_of(np.rint(peaks / step)))

        def size_at(step: float) -> int:
            widths = widths_at(step)
            rank = int(np.flatnonzero(widths.any(1)).max(initial=-1)) + 1
            return rank * (2 * tokens + widths.shape[1]) + bits.packed_bytes(widths, self._run)

        def fits(step: float) -> bool:
            if self.config.energy is None:
                return size_at(step) <= budget_bytes
            kept = torch.from_numpy(widths_at(step) > 0).to(runs.device)[..., None]
            error = (runs - torch.where(kept, (runs / step).round() * step, 0.0)).square().sum()
            return bool(error > (1 - self.config.energy) * runs.square().sum())

        low = max(peaks.max(), 1e-30) / (2 ** (bits.MAX_WIDTH - 1) - 1)
        high = max(peaks.max(), 1e-30) * 4
        for _ in range(_BISECTIONS):
            middle = (low * high) ** 0.5
            low, high = (low, middle) if fits(middle) else (middle, high)
        step = float(np.nextafter(np.float32(high), np.float32(np.inf)))  # rounded up, or it might not fit
        return step, widths_at(step)

    def _compose(self, parts: _Parts, start: int, out_KLHTD: torch.Tensor) -> None:
        """Write what the parts stand for."""
        lay, tokens = self.layout, out_KLHTD.shape[3]
        if not tokens:
            return
        m_TN = parts.u_TR.float() @ (parts.codes_RN.float() * parts.step)
        y = m_TN.view(tokens, lay.layers, 2, lay.kv_heads, lay.head_dim).permute(1, 2, 3, 0, 4)
        y = y * parts.rms_LK[..., None, None, None] + parts.mean_LKHD.float()[..., None, :]
        y[:, 0] = self._rotate(y[:, 0], start)
        largest = torch.finfo(lay.dtype).max
        out_KLHTD.copy_((y * parts.peak_LK[..., None, None, None]).clamp_(-largest, largest).transpose(0, 1))

    def _rotate(self, k_LHTD: torch.Tensor, start: int, *, inverse: bool = False) -> torch.Tensor:
        positions = torch.arange(start, start + k_LHTD.shape[2], device=k_LHTD.device)
        return self.layout.rope.rotate(k_LHTD, positions, inverse=inverse)

    def _decode(self, blocks: Sequence[Stored], tokens_BT: torch.Tensor | None, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor) -> None:
        for block, k_LHTD, v_LHTD in zip(blocks, k_BLHTD, v_BLHTD, strict=True):
            exact = 1 if block.start == 0 else 0
            first_KLHAD, parts = self._parse(block, exact, k_BLHTD.device)
            out = torch.empty(2, *k_LHTD.shape, dtype=self.layout.dtype, device=k_BLHTD.device)
            out[:, :, :, :exact] = first_KLHAD
            self._compose(parts, block.start + exact, out[:, :, :, exact:])
            k_LHTD.copy_(out[0])
            v_LHTD.copy_(out[1])

    def _parse(self, block: Stored, exact: int, device: torch.device) -> tuple[torch.Tensor, _Parts]:
        lay, payload, tokens = self.layout, block.layers[0], block.tokens - exact
        if len(payload) < _HEAD.size:
            raise CorruptBlockError(f"{len(payload)} bytes are no svd block")
        rank, step = _HEAD.unpack_from(payload)
        heads, layers = self._run, lay.layers
        sizes = [2 * heads * layers * exact * lay.dtype.itemsize, 16 * layers, 4 * layers * heads, 2 * tokens * rank, rank * layers * 2]
        if rank > tokens or _HEAD.size + sum(sizes) > len(payload):
            raise CorruptBlockError(f"an svd block of {len(payload)} bytes cannot hold rank {rank} of {tokens} tokens")
        at = _HEAD.size + sum(sizes)
        data = tensor_from_buffer(payload[_HEAD.size : at], device).split(sizes)
        first = wide(data[0], lay.dtype, 2, layers, lay.kv_heads, exact, lay.head_dim)
        scales = wide(data[1], torch.float32, 2, layers, 2)
        mean = wide(data[2], torch.float16, layers, 2, lay.kv_heads, lay.head_dim)
        u_TR = wide(data[3], torch.float16, tokens, rank)
        if not (np.isfinite(step) and is_finite(scales) and is_finite(mean) and (not u_TR.numel() or is_finite(u_TR))):
            raise CorruptBlockError("a number of this svd block is not finite")
        codes = bits.unpack(payload[at:], data[4].cpu().numpy(), heads)
        codes_RN = torch.from_numpy(codes).to(device).view(rank, 2 * layers * heads)
        return first, _Parts(step, scales[0], scales[1], mean, u_TR, codes_RN)


def _raw(x: torch.Tensor) -> bytes:
    return x.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes()
