"""Native loops of `int8` for the CPU: one pass from codes to the cache's dtype, and one back.

They give the same payload and values, bit for bit, as the plain torch code in `scaled.py`, which serves every other device and is
their test's oracle. Importing this module imports `numba`, so it is imported on first use; the first call for a dtype compiles for a
second or two. The loops release the GIL and run on plain threads: numba's own pool may abort the process when two Python threads
enter it at once.

Elements travel as integers of their bits: uint16 for the 16-bit dtypes, uint32 for float32. Layout of the payload: `scaled.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .scales import largest_scale

_TOP = np.float32(127)
#: Adding it leaves a float32's nearest whole number in the low bits (ties to even), for magnitudes below 2^22.
_MAGIC = np.float32(1.5 * 2**23)
_FAST = {"nogil": True, "error_model": "numpy"}


def _cast(generate: Callable[[Any, Any], Any], result: Any, argument: Any) -> Any:
    """An intrinsic of one argument from a function of LLVM's builder and the value."""

    @intrinsic
    def cast(typing_context: Any, x: Any) -> Any:
        return result(argument), lambda context, builder, signature, args: generate(builder, args[0])

    return cast


_bits = _cast(lambda b, x: b.bitcast(x, ir.IntType(32)), types.uint32, types.float32)
_float = _cast(lambda b, x: b.bitcast(x, ir.FloatType()), types.float32, types.uint32)
_to_f16 = _cast(lambda b, x: b.bitcast(b.fptrunc(x, ir.HalfType()), ir.IntType(16)), types.uint16, types.float32)
_from_f16 = _cast(lambda b, x: b.fpext(b.bitcast(x, ir.HalfType()), ir.FloatType()), types.float32, types.uint16)


@njit(**_FAST)
def _to_bf16(x):
    bits = _bits(x)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(**_FAST)
def _from_bf16(bits):
    return _float(np.uint32(bits) << np.uint32(16))


def _conversions(dtype: torch.dtype) -> tuple[Any, Any, Any, Any]:
    """Element from and to float32, then the scale's."""
    scale = (_from_f16, _to_f16) if dtype == torch.float16 else (_from_bf16, _to_bf16)
    return (_float, _bits, *scale) if dtype == torch.float32 else (*scale, *scale)


@cache
def decoder(dtype: torch.dtype) -> Callable[..., bool]:
    """The loop that decodes K or V of one block; it returns whether every scale was finite."""
    _, to_bits, scale_from, _ = _conversions(dtype)

    @njit(**_FAST)
    def decode(data, layer_bytes, scales_at, codes_at, shape, groups, out, base, strides):
        layers, heads, tokens, dim = shape
        width = dim // groups
        finite = True
        for layer in range(layers):
            scale_at, code_at = layer * layer_bytes + scales_at, layer * layer_bytes + codes_at
            for head in range(heads):
                for token in range(tokens):
                    row = base + layer * strides[0] + head * strides[1] + token * strides[2]
                    for _group in range(groups):
                        scale = scale_from(np.uint16(data[scale_at] | np.uint16(data[scale_at + 1]) << np.uint16(8)))
                        finite &= np.isfinite(scale)
                        codes, target = data[code_at : code_at + width], out[row : row + width]
                        for i in range(width):
                            target[i] = to_bits(np.float32(np.int8(codes[i])) * scale)
                        scale_at, code_at, row = scale_at + 2, code_at + width, row + width
        return finite

    return decode


@cache
def encoder(dtype: torch.dtype) -> Callable[..., tuple[float, float]]:
    """The loop that encodes K or V of one block; it returns the squared error and the sum of squares."""
    from_bits, to_bits, scale_from, scale_to = _conversions(dtype)
    most = np.float32(largest_scale(dtype, float(_TOP)))

    @njit(fastmath={"reassoc"}, **_FAST)
    def measure(x, codes, scale):
        error = energy = np.float32(0)
        for i in range(len(x)):
            given = from_bits(x[i])
            kept = from_bits(to_bits(np.float32(np.int8(codes[i])) * scale))
            error += (kept - given) * (kept - given)
            energy += given * given
        return error, energy

    @njit(**_FAST)
    def encode(x, rows, dim, groups, scales, codes):
        width = dim // groups
        error = energy = 0.0
        for at in range(rows * groups):
            source, target = x[at * width : (at + 1) * width], codes[at * width : (at + 1) * width]
            peak = np.uint32(0)
            for i in range(width):
                peak = max(peak, _bits(from_bits(source[i])) & np.uint32(0x7FFFFFFF))
            want = _float(peak) / _TOP
            bits = scale_to(want)
            if scale_from(bits) < want:
                bits = np.uint16(bits + 1)
            if scale_from(bits) > most:
                bits = scale_to(most)
            scales[at] = bits
            scale = scale_from(bits)
            step = scale if scale > 0 else np.float32(1)
            for i in range(width):
                nearest = min(max(from_bits(source[i]) / step, -_TOP), _TOP) + _MAGIC
                target[i] = np.uint8(_bits(nearest) & np.uint32(0xFF))
            part = measure(source, target, scale)
            error, energy = error + part[0], energy + part[1]
        return error, energy

    return encode


def flat_bits(x: torch.Tensor) -> np.ndarray:
    """All of the storage behind `x` as a 1-D array of its elements' bits; `x` starts at ``x.storage_offset()`` in it."""
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage(), 0, (x.untyped_storage().nbytes() // x.itemsize,))
    return whole.view(torch.int16 if x.itemsize == 2 else torch.int32).numpy().view(np.uint16 if x.itemsize == 2 else np.uint32)


def run_all(tasks: Sequence[partial[Any]]) -> list[Any]:
    """Results of independent tasks, run on as many threads as torch itself would use."""
    threads = min(torch.get_num_threads(), len(tasks))
    if threads == 1:
        return [task() for task in tasks]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda task: task(), tasks))
