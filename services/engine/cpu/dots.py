"""The inner loop of attention's logits: scalar products of a few queries with a few keys, all in vector registers.

    out[g, t] = scale · Σ_lane Σ_i q[g, 8 i + lane] · k[t, 8 i + lane]

The inner sum runs in the order of i, the outer one as a tree over the lanes, for every pair on its own: the bits do not depend on how
many pairs there are. Reading a key once for several queries and adding up lanes only at the end is what a compiler does not find.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .tiles import FLOAT, LANES, VECTOR, element, weights_at

_INDEX = ir.IntType(32)


def dots(queries: int, keys: int, kind: Any) -> Callable[..., None]:
    """An intrinsic for `queries` times `keys` scalar products.

    Its arguments: address of q (float32) and the distance of its rows in elements, address of the keys (`kind`: types.float32, or
    types.uint16 for bfloat16), whose rows follow one another, their number of channels, a multiple of `LANES`, the factor, and address
    of out (float32) and the distance of its rows.
    """

    @intrinsic
    def multiply(typing_context: Any, q: Any, q_stride: Any, k: Any, dim: Any, scale: Any, out: Any, out_stride: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _generate(builder, args, queries, keys, kind is types.uint16)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 4, types.float32, *[types.intp] * 2), generate

    return multiply


def _generate(b: Any, args: Any, queries: int, keys: int, bfloat16: bool) -> None:
    q, q_stride, k, dim, scale, out, out_stride = args
    word = dim.type
    pairs = list(product(range(queries), range(keys)))
    q_rows = [element(b, q, FLOAT, b.mul(q_stride, word(g))) for g in range(queries)]

    before, loop, after = b.block, b.append_basic_block("channels"), b.append_basic_block("summed")
    b.branch(loop)
    b.position_at_end(loop)
    at = b.phi(word)
    sums = [b.phi(VECTOR) for _ in pairs]
    q_parts = [b.load(b.bitcast(b.gep(row, [at]), VECTOR.as_pointer()), align=4) for row in q_rows]
    k_parts = [weights_at(b, k, b.add(b.mul(dim, word(t)), at), bfloat16) for t in range(keys)]
    fma = cgutils.get_or_insert_function(b.module, ir.FunctionType(VECTOR, [VECTOR] * 3), f"llvm.fma.v{LANES}f32")
    grown = [b.call(fma, [q_parts[g], k_parts[t], total]) for (g, t), total in zip(pairs, sums, strict=True)]
    following = b.add(at, word(LANES))
    b.cbranch(b.icmp_signed("<", following, dim), loop, after)

    at.add_incoming(word(0), before)
    at.add_incoming(following, loop)
    for total, new in zip(sums, grown, strict=True):
        total.add_incoming(ir.Constant(VECTOR, [0.0] * LANES), before)
        total.add_incoming(new, loop)
    b.position_at_end(after)
    for (g, t), total in zip(pairs, grown, strict=True):
        b.store(b.fmul(_over_lanes(b, total), scale), element(b, out, FLOAT, b.add(b.mul(out_stride, word(g)), word(t))))


def _over_lanes(b: Any, vector: Any) -> Any:
    """The sum of a vector's lanes: halves on halves."""
    width = LANES
    while width > 1:
        width //= 2
        low, high = ([_INDEX(at) for at in span] for span in (range(width), range(width, 2 * width)))
        kind = ir.VectorType(_INDEX, width)
        low, high = (b.shuffle_vector(vector, vector, ir.Constant(kind, lanes)) for lanes in (low, high))
        vector = b.fadd(low, high)
    return b.extract_element(vector, _INDEX(0))
