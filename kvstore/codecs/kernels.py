"""Native loops of the codecs without a profile, for the CPU: one pass from codes to the cache's type, and one back.

They give the same payload and values as the plain torch code in `scaled.py` and `grouped.py`, which serves every other device and is
their test's oracle. Importing this module imports `numba`, so it is imported on first use; a loop is compiled once a machine and type,
and kept on disk. The loops release the GIL and run on plain threads (`parallel.py`).

Elements travel as `floats.py` says. Layouts of the payloads: `scaled.py`, `grouped.py`.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import types
from numba.extending import overload

from .floats import bits_of, float_of, narrowed, widened

_jit = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")
#: Adding it leaves a float32's nearest whole number in the low bits (ties to even), for magnitudes below 2^22.
_MAGIC = np.float32(1.5 * 2**23)
_TOP_INT8 = np.float32(127)
#: An E4M3 code without its sign, moved to where a float32 has exponent and mantissa, times this is its value, subnormal or not.
_E4M3 = np.float32(2.0**120)
_E4M3_NAN = 0x7F


def _scale(bits, like):  # type: ignore[no-untyped-def]
    """float32 of a stored scale: float16 beside float16 elements, else bfloat16 (`scales.scale_dtype`)."""
    raise NotImplementedError


@overload(_scale)
def _scale_of(bits, like):  # type: ignore[no-untyped-def]
    if like == types.int16:
        return lambda bits, like: widened(np.int16(bits))
    return lambda bits, like: widened(np.uint16(bits))


@_jit
def decode_int8(data, layer_bytes, scales_at, codes_at, shape, groups, out, base, strides):  # type: ignore[no-untyped-def]
    """Decode K or V of one block; returns whether every scale was finite."""
    layers, heads, tokens, dim = shape
    width, finite, one = dim // groups, True, out.dtype.type(0)
    for layer in range(layers):
        scale_at, code_at = layer * layer_bytes + scales_at, layer * layer_bytes + codes_at
        for head in range(heads):
            for token in range(tokens):
                row = base + layer * strides[0] + head * strides[1] + token * strides[2]
                for _group in range(groups):
                    scale = _scale(np.uint16(data[scale_at] | np.uint16(data[scale_at + 1]) << np.uint16(8)), one)
                    finite &= np.isfinite(scale)
                    codes, target = data[code_at : code_at + width], out[row : row + width]
                    for i in range(width):
                        target[i] = narrowed(np.float32(np.int8(codes[i])) * scale, one)
                    scale_at, code_at, row = scale_at + 2, code_at + width, row + width
    return finite


@_jit
def decode_fp8(data, layer_bytes, scales_at, codes_at, shape, groups, out, base, strides):  # type: ignore[no-untyped-def]
    """As `decode_int8`, for E4M3 codes; returns whether all codes and scales were finite."""
    layers, heads, tokens, dim = shape
    width, finite, one, largest = dim // groups, True, out.dtype.type(0), np.uint8(0)
    for layer in range(layers):
        scale_at, code_at = layer * layer_bytes + scales_at, layer * layer_bytes + codes_at
        for head in range(heads):
            for token in range(tokens):
                row = base + layer * strides[0] + head * strides[1] + token * strides[2]
                for _group in range(groups):
                    scale = _scale(np.uint16(data[scale_at] | np.uint16(data[scale_at + 1]) << np.uint16(8)), one)
                    finite &= np.isfinite(scale)
                    codes, target = data[code_at : code_at + width], out[row : row + width]
                    for i in range(width):
                        code = np.uint32(codes[i])
                        largest = max(largest, np.uint8(code & np.uint32(_E4M3_NAN)))
                        size = float_of((code & np.uint32(0x7F)) << np.uint32(20)) * _E4M3
                        value = float_of(bits_of(size * scale) | ((code & np.uint32(0x80)) << np.uint32(24)))
                        target[i] = narrowed(value, one)
                    scale_at, code_at, row = scale_at + 2, code_at + width, row + width
    return finite and largest != _E4M3_NAN


@numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy", fastmath={"reassoc"})
def _loss(x, codes, scale):  # type: ignore[no-untyped-def]
    """Squared error and sum of squares of one group."""
    error = energy = np.float32(0)
    for i in range(len(x)):
        given = widened(x[i])
        kept = widened(narrowed(np.float32(np.int8(codes[i])) * scale, x[i]))
        error += (kept - given) * (kept - given)
        energy += given * given
    return error, energy


@_jit
def encode_int8(x, rows, dim, groups, most, scales, codes):  # type: ignore[no-untyped-def]
    """Encode dense rows of K or V; returns the squared error and the sum of squares.

    Parameters
    ----------
    most : float32
        `scales.largest_scale`.
    scales : uint16 or (beside float16 elements) int16 [rows · groups]
    codes : uint8 [rows · dim]
    """
    width = dim // groups
    error = energy = 0.0
    for at in range(rows * groups):
        source, target = x[at * width : (at + 1) * width], codes[at * width : (at + 1) * width]
        peak = np.uint32(0)
        for i in range(width):
            peak = max(peak, bits_of(widened(source[i])) & np.uint32(0x7FFFFFFF))
        want = float_of(peak) / _TOP_INT8
        bits = narrowed(want, scales[at])
        if widened(bits) < want:
            bits = scales.dtype.type(bits + 1)
        if widened(bits) > most:
            bits = narrowed(most, scales[at])
        scales[at] = bits
        scale = widened(bits)
        step = scale if scale > 0 else np.float32(1)
        for i in range(width):
            nearest = min(max(widened(source[i]) / step, -_TOP_INT8), _TOP_INT8) + _MAGIC
            target[i] = np.uint8(bits_of(nearest) & np.uint32(0xFF))
        part = _loss(source, target, scale)
        error, energy = error + part[0], energy + part[1]
    return error, energy


@_jit
def _turn(x, size):  # type: ignore[no-untyped-def]
    """Each run of `size` numbers times Sylvester's orthogonal matrix: the fast Walsh-Hadamard transform, in place."""
    half = 1
    while half < size:
        for at in range(0, x.size, 2 * half):
            for i in range(at, at + half):
                a, b = x[i], x[i + half]
                x[i], x[i + half] = a + b, a - b
        half *= 2
    norm = np.float32(1) / np.sqrt(np.float32(size))
    for i in range(x.size):
        x[i] *= norm


@_jit
def _affine(offset, code, scale):  # type: ignore[no-untyped-def]
    """offset + code · scale. By halves: the product alone may lie beyond float32's range where the sum does not."""
    return (np.float32(0.5) * offset + code * (np.float32(0.5) * scale)) * np.float32(2)


@_jit
def decode_affine(data, layer_bytes, codes_at, fit, group, by_channel, bits, size, largest, out, base, strides, shape):  # type: ignore[no-untyped-def]
    """Decode K or V of one block, all but its exact first token.

    Parameters
    ----------
    data : uint8 [L · layer_bytes]
        Codes of layer l start at ``l * layer_bytes + codes_at``.
    fit : float32 [L, 2, H, N, D] for groups of `group` tokens (`by_channel`), else [L, 2, H, T, G]
        Offsets and scales.
    size : int
        Of the Hadamard matrix that the values were turned by; 1 for none.
    out, base, strides, shape
        Elements of the cache, where the first coded token of the block lies, strides over layer, head and token, and [L, H, T, D].
    """
    layers, heads, tokens, dim = shape
    row_bytes, mask, one = (dim * bits + 7) // 8, np.uint8((1 << bits) - 1), out.dtype.type(0)
    x = np.empty(dim, dtype=np.float32)
    for layer in range(layers):
        at = layer * layer_bytes + codes_at
        for head in range(heads):
            for token in range(tokens):
                packed = data[at : at + row_bytes]
                at += row_bytes
                for plane in range(8 // bits):
                    low = plane * row_bytes
                    part = x[low : min(low + row_bytes, dim)]
                    for i in range(part.size):
                        part[i] = np.float32((packed[i] >> np.uint8(plane * bits)) & mask)
                if by_channel:
                    offsets, scales = fit[layer, 0, head, token // group], fit[layer, 1, head, token // group]
                    for i in range(dim):
                        x[i] = _affine(offsets[i], x[i], scales[i])
                else:
                    width = dim // fit.shape[4]
                    for g in range(fit.shape[4]):
                        offset, scale = fit[layer, 0, head, token, g], fit[layer, 1, head, token, g]
                        for i in range(g * width, (g + 1) * width):
                            x[i] = _affine(offset, x[i], scale)
                if size > 1:
                    _turn(x, size)
                begin = base + layer * strides[0] + head * strides[1] + token * strides[2]
                target = out[begin : begin + dim]
                for i in range(dim):
                    target[i] = narrowed(min(max(x[i], -largest), largest), one)
