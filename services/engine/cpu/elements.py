"""Elements of tensors in native code: pointers from addresses, floats from bits, and their exp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

#: Options of every kernel here. They are kept on disk, because compiling takes seconds.
JIT: dict[str, Any] = {"nogil": True, "error_model": "numpy", "cache": True}
_LOG2_E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
#: Of exp's polynomial on [-ln 2 / 2, ln 2 / 2], highest power first (Cephes, expf).
_EXP = tuple(np.float32(c) for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1))
#: Below it exp is taken as that of it.
_LOWEST = np.float32(-87.0)
#: Adding and taking away this rounds to a whole number.
_ROUND = np.float32(1.5 * 2**23)


def _pointer(element: Any) -> Callable[[int], Any]:
    """An intrinsic: the address of an element as a pointer."""

    @intrinsic
    def pointer(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.intp), generate

    return pointer


float32_at = _pointer(types.float32)
uint16_at = _pointer(types.uint16)


@intrinsic
def float_of_bits(typing_context: Any, bits: Any) -> Any:
    """The float32 with these 32 bits."""
    return types.float32(types.uint32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.FloatType())


@njit(fastmath={"contract"}, **JIT)
def exp(x):
    """exp(x) for x <= 87, to 1 unit in the last place; free of branches and calls, so that a loop over it becomes vector code."""
    x = x if x > _LOWEST else _LOWEST
    whole = (x * _LOG2_E + _ROUND) - _ROUND
    x = x - whole * _LN2_HIGH - whole * _LN2_LOW
    y = ((((_EXP[0] * x + _EXP[1]) * x + _EXP[2]) * x + _EXP[3]) * x + _EXP[4]) * x + _EXP[5]
    y = y * x * x + x + np.float32(1)
    return y * float_of_bits(np.uint32((np.int32(whole) + np.int32(127)) << np.int32(23)))
