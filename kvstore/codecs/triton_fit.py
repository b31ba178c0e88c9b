"""Fitting affine groups on CUDA in one pass: `GroupedCodec._fit` reads and writes its values some thirty times.

Runs on the CPU too, under ``TRITON_INTERPRET=1``; the tests do that. `triton` is optional and imported with this module only.

Legend, in the kernel: i a group's elements, j groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Values that one program holds.
_TILE = 2048
_LARGEST = tl.constexpr(torch.finfo(torch.bfloat16).max)
#: Adding it and taking it away again leaves the nearest whole number (ties to even), for magnitudes below 2^22.
_MAGIC = tl.constexpr(1.5 * 2**23)


@triton.jit
def _cut(x):
    """`x` without what a bfloat16 has no room for: towards zero."""
    return ((x.to(tl.int32, bitcast=True) >> 16) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _away(x):
    """The bfloat16 next to the bfloat16 `x`, away from zero."""
    return (x.to(tl.int32, bitcast=True) + 0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _nearest(x):
    bits = x.to(tl.int32, bitcast=True)
    rounded = _cut((bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True))
    return tl.where(x == x, rounded, x)


@triton.jit
def _codes(x, offset, scale, TOP: tl.constexpr):
    step = tl.where(scale > 0, scale, 1.0)
    code = tl.div_rn(x, tl.broadcast_to(step[None, :], x.shape)) - tl.div_rn(offset, step)[None, :]
    return (tl.minimum(tl.maximum(code, 0.0), TOP) + _MAGIC) - _MAGIC


@triton.jit
def _error(x, offset, scale, codes, real):
    error = tl.where(real, offset[None, :] + codes * scale[None, :] - x, 0.0)
    return tl.sum(error * error, 0)


@triton.jit
def _least_squares(x, codes, real, n):
    x_mean, code_mean = tl.sum(x, 0) / n, tl.sum(tl.where(real, codes, 0.0), 0) / n
    spread = tl.where(real, codes - code_mean[None, :], 0.0)
    scale = (tl.sum((x - x_mean[None, :]) * spread, 0) / n) / tl.maximum(tl.sum(spread * spread, 0) / n, 1e-12)
    return x_mean - scale * code_mean, scale


@triton.jit(do_not_specialize=["layer_groups"])  # it differs for the first block, which would wait for a compiler
def _fit_kernel(
    values, fits, codes_out, groups, layer_groups, inner, n,
    LENGTH: tl.constexpr, GROUPS: tl.constexpr, TOP: tl.constexpr, REFITS: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    i = tl.arange(0, LENGTH)
    real = (i < n)[:, None]
    inside = real & (j < groups)[None, :]
    at = ((j // inner) * n * inner + j % inner)[None, :] + (i * inner)[:, None]
    x = tl.load(values + at, mask=inside, other=0).to(tl.float32)
    low, high = tl.min(tl.where(real, x, float("inf")), 0), tl.max(tl.where(real, x, float("-inf")), 0)
    offset = _cut(low)
    offset = tl.maximum(tl.where(offset > low, _away(offset), offset), -_LARGEST)
    top = tl.full((GROUPS,), TOP, tl.float32)
    wanted = tl.div_rn(high, top) - tl.div_rn(offset, top)
    scale = _nearest(wanted)
    scale = tl.minimum(tl.where(scale < wanted, _away(scale), scale), _LARGEST)
    codes = _codes(x, offset, scale, TOP)
    if REFITS:
        best = _error(x, offset, scale, codes, real)
        for _ in tl.static_range(REFITS):
            new_offset, new_scale = _least_squares(x, codes, real, n)
            new_offset, new_scale = _nearest(new_offset), _nearest(new_scale)
            new_codes = _codes(x, new_offset, new_scale, TOP)
            error = _error(x, new_offset, new_scale, new_codes, real)
            better = error < best  # False for NaN, so a fit that overflowed is never taken
            offset, scale = tl.where(better, new_offset, offset), tl.where(better, new_scale, scale)
            codes, best = tl.where(better[None, :], new_codes, codes), tl.where(better, error, best)
    tl.store(codes_out + at, codes.to(tl.uint8), mask=inside)
    place = (j // layer_groups) * 2 * layer_groups + j % layer_groups
    tl.store(fits + place, offset.to(tl.bfloat16), mask=j < groups)
    tl.store(fits + place + layer_groups, scale.to(tl.bfloat16), mask=j < groups)


def fit(x: torch.Tensor, bits: int, refits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `GroupedCodec._fit` gives for `x` [L, …, n] of any float type, whose last dimension or the one before it is dense.

    The same bits without refits; with them sums are taken in another order.
    """
    inner = 1 if x.stride(-1) == 1 else x.shape[-2]
    x = x.contiguous() if inner == 1 else x.transpose(-1, -2).contiguous().transpose(-1, -2)
    n, groups = x.shape[-1], x.numel() // x.shape[-1]
    fits = torch.empty(x.shape[0], 2, *x.shape[1:-1], dtype=torch.bfloat16, device=x.device)
    codes = torch.empty_like(x, dtype=torch.uint8)
    length = triton.next_power_of_2(n)
    tile = max(1, _TILE // length)
    with torch.cuda.device_of(x):
        _fit_kernel[(triton.cdiv(groups, tile),)](
            x, fits, codes, groups, groups // x.shape[0], inner, n, LENGTH=length, GROUPS=tile, TOP=2**bits - 1, REFITS=refits
        )
    return fits, codes
