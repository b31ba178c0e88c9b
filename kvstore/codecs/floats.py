"""Elements of tensors inside native loops: numba has no half-precision numbers, so they travel as integers of the same width.

`elements` gives a tensor's storage as an array whose dtype says which float it holds: float32 itself, int16 for float16, uint16 for
bfloat16. In a kernel, ``widened(a[i])`` is the float32 that an element stands for, and ``narrowed(x, a.dtype.type(0))`` the nearest
element of `a` (ties to even; a NaN need not stay one). So one kernel serves all three types, compiled and cached for each when first used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload, register_jitable

_NUMPY_TYPES = {torch.float32: np.float32, torch.float16: np.int16, torch.bfloat16: np.uint16}


def elements(x: torch.Tensor) -> np.ndarray:
    """All of the storage behind `x` as a 1-D array of its elements; `x` starts at ``x.storage_offset()`` in it."""
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage(), 0, (x.untyped_storage().nbytes() // x.itemsize,))
    return (whole if x.dtype == torch.float32 else whole.view(torch.int16)).numpy().view(_NUMPY_TYPES[x.dtype])


def view_of(x: torch.Tensor) -> np.ndarray:
    """A dense tensor as an array of its elements, in its own shape."""
    return (x if x.dtype == torch.float32 else x.view(torch.int16)).numpy().view(_NUMPY_TYPES[x.dtype])


def _cast(generate: Callable[[Any, Any], Any], result: Any, argument: Any) -> Any:
    """An intrinsic of one argument from a function of LLVM's builder and the value."""

    @intrinsic
    def cast(typing_context: Any, x: Any) -> Any:
        return result(argument), lambda context, builder, signature, args: generate(builder, args[0])

    return cast


bits_of = _cast(lambda b, x: b.bitcast(x, ir.IntType(32)), types.uint32, types.float32)
float_of = _cast(lambda b, x: b.bitcast(x, ir.FloatType()), types.float32, types.uint32)
_to_f16 = _cast(lambda b, x: b.bitcast(b.fptrunc(x, ir.HalfType()), ir.IntType(16)), types.int16, types.float32)
_from_f16 = _cast(lambda b, x: b.fpext(b.bitcast(x, ir.HalfType()), ir.FloatType()), types.float32, types.int16)


def widened(element: Any) -> Any:
    """float32 of an element; only inside compiled functions."""
    raise NotImplementedError


def narrowed(x: Any, like: Any) -> Any:
    """The element of the type of `like` that is nearest to the float32 `x`; only inside compiled functions."""
    raise NotImplementedError


@overload(widened)
def _widened(element):  # type: ignore[no-untyped-def]
    if element == types.uint16:
        return lambda element: float_of(np.uint32(element) << np.uint32(16))
    if element == types.int16:

        def from_f16(element):  # type: ignore[no-untyped-def]
            return _from_f16(element)

        return from_f16
    return lambda element: element


@overload(narrowed)
def _narrowed(x, like):  # type: ignore[no-untyped-def]
    if like == types.uint16:
        return lambda x, like: _nearest_bf16(bits_of(x))
    if like == types.int16:
        return lambda x, like: _to_f16(x)
    return lambda x, like: x


@register_jitable
def _nearest_bf16(bits):  # type: ignore[no-untyped-def]
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
