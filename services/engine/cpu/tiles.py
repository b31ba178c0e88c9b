"""The inner loop of a product of few rows: a tile of outputs that stays in vector registers while all inputs pass.

    out[r, j] = fma(x[r, K-1], w[K-1, j], … fma(x[r, 1], w[1, j], fma(x[r, 0], w[0, j], 0)) …)

One fused multiply-add an input, in the order of the inputs, for every output on its own: no reordering that a compiler may choose, so
the bits do not depend on the tile's shape, and a row keeps them in any company. Written in LLVM's own terms, because numba
keeps no array in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

#: float32 numbers of one vector register (AVX2; where registers are wider, LLVM may use half of them).
LANES = 8
#: Outputs of a panel of weights: for each input, this many weights lie side by side.
PANEL = 48
FLOAT, _HALF = ir.FloatType(), ir.IntType(16)
VECTOR = ir.VectorType(FLOAT, LANES)
_WORDS = ir.VectorType(ir.IntType(32), LANES)


def tile(rows: int, vectors: int, weight: Any, *, asks_ahead: bool = False, grows: bool = False) -> Callable[..., None]:
    """An intrinsic for the products of `rows` rows with `vectors` vectors of outputs.

    Its arguments: address of x (float32) and the distances of its rows and of its inputs in elements, address of out (float32) and the
    distance of its rows, address of the first input's weights for these outputs (`weight`: types.float32, or types.uint16 for bfloat16)
    and the distance of the next input's in elements, the number of inputs, at least 1, and, with `asks_ahead`, what to bring near: an
    address, whether there is memory of ours or not, and how many bytes from it on for each input. With `grows` the products are added
    to what `out` holds. Weights that lie across cache lines halve the speed.
    """

    @intrinsic
    def multiply(
        typing_context: Any, x: Any, x_stride: Any, x_step: Any, out: Any, out_stride: Any, weights: Any, stride: Any, inputs: Any,
        ahead: Any, ahead_step: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _generate(builder, args, rows, vectors, weight is types.uint16, asks_ahead, grows)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 10), generate

    return multiply


def _generate(b: Any, args: Any, rows: int, vectors: int, bfloat16: bool, asks_ahead: bool, grows: bool) -> None:
    x, x_stride, x_step, out, out_stride, weights, stride, inputs, ahead, ahead_step = args
    word = inputs.type
    cells = list(product(range(rows), range(vectors)))
    x_rows = [element(b, x, FLOAT, b.mul(x_stride, word(r))) for r in range(rows)]
    offsets = [b.add(b.mul(out_stride, word(r)), word(v * LANES)) for r, v in cells]
    targets = [b.bitcast(element(b, out, FLOAT, offset), VECTOR.as_pointer()) for offset in offsets]
    zero = ir.Constant(VECTOR, [0.0] * LANES)
    firsts = [b.load(target, align=4) if grows else zero for target in targets]
    if not grows:
        for target in targets:
            _prefetch(b, target, writes=True)

    before, loop, after = b.block, b.append_basic_block("input"), b.append_basic_block("done")
    b.branch(loop)
    b.position_at_end(loop)
    at = b.phi(word)
    sums = [b.phi(VECTOR) for _ in cells]
    if asks_ahead:
        byte = ir.IntType(8).as_pointer()
        _prefetch(b, b.inttoptr(b.add(ahead, b.mul(at, ahead_step)), byte))
    columns = [weights_at(b, weights, b.add(b.mul(at, stride), word(v * LANES)), bfloat16) for v in range(vectors)]
    place = b.mul(at, x_step)
    inputs_of_rows = [_splat(b, b.load(b.gep(row, [place]))) for row in x_rows]
    fma = cgutils.get_or_insert_function(b.module, ir.FunctionType(VECTOR, [VECTOR] * 3), f"llvm.fma.v{LANES}f32")
    grown = [b.call(fma, [inputs_of_rows[r], columns[v], total]) for (r, v), total in zip(cells, sums, strict=True)]
    following = b.add(at, word(1))
    branch = b.cbranch(b.icmp_signed("<", following, inputs), loop, after)
    branch.set_metadata("llvm.loop", _as_it_is(b.module))

    at.add_incoming(word(0), before)
    at.add_incoming(following, loop)
    for total, first, new in zip(sums, firsts, grown, strict=True):
        total.add_incoming(first, before)
        total.add_incoming(new, loop)
    b.position_at_end(after)
    for target, total in zip(targets, grown, strict=True):
        b.store(total, target, align=4)


def _as_it_is(module: Any) -> Any:
    """For a loop that LLVM is not to unroll: it may keep a sum in memory then, which halves the speed."""
    disable = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
    loop = ir.MDValue(module, [disable], name=str(len(module.metadata)))
    loop.operands = (loop, disable)  # the first operand of a loop's metadata is itself
    return loop


def _prefetch(b: Any, place: Any, writes: bool = False) -> None:
    """Ask for a cache line: for the second level of the cache if it is to be read, for the first if it is to be written."""
    byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
    hint = cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag]), "llvm.prefetch.p0")
    b.call(hint, [b.bitcast(place, byte), flag(int(writes)), flag(3 if writes else 2), flag(1)])


def element(b: Any, address: Any, element: Any, offset: Any) -> Any:
    """Pointer to the element `offset` elements behind `address`."""
    return b.gep(b.inttoptr(address, element.as_pointer()), [offset])


def weights_at(b: Any, address: Any, offset: Any, bfloat16: bool) -> Any:
    """`LANES` weights as float32."""
    if not bfloat16:
        return b.load(b.bitcast(element(b, address, FLOAT, offset), VECTOR.as_pointer()), align=4)
    halves = b.load(b.bitcast(element(b, address, _HALF, offset), ir.VectorType(_HALF, LANES).as_pointer()), align=2)
    return b.bitcast(b.shl(b.zext(halves, _WORDS), ir.Constant(_WORDS, [16] * LANES)), VECTOR)


def _splat(b: Any, value: Any) -> Any:
    nothing = ir.Constant(VECTOR, ir.Undefined)
    first = b.insert_element(nothing, value, ir.IntType(32)(0))
    return b.shuffle_vector(first, nothing, ir.Constant(_WORDS, [0] * LANES))
