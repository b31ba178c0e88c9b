"""Elements of tensors in native code: pointers from addresses, floats from bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

#: Options of every kernel here. They are kept on disk, because compiling takes seconds.
JIT: dict[str, Any] = {"nogil": True, "error_model": "numpy", "cache": True}


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
