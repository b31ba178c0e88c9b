"""Copy bytes and take their CRC-32C on the way: each is read once, and what is checked is what was written.

To copy first and check afterwards reads everything twice, which costs a third of the speed. Here 64 bytes at a time are held in registers,
stored, and folded into four 128-bit remainders by carry-less multiplication; the remainders are folded into one at the end, and the
``crc32`` instruction takes that and the last bytes. Since the registers are what is stored, it does not matter whether somebody else writes
to the source meanwhile.

Folding: V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel 2009. The polynomial is
CRC-32C's, bits reflected. Where the processor is another one, bytes are copied and checked in pieces that its cache holds.
"""

from __future__ import annotations

import ctypes
import platform
from array import array
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from crc32c import crc32c

from .block import Buffer

_POLYNOMIAL = 0x82F63B78
#: Bytes that are copied and then checked while the processor's cache still holds them.
_PIECE_BYTES = 256 << 10
#: Bytes a step, and how far ahead memory is fetched.
_STEP, _AHEAD = 64, 512
_NEEDED = ("pclmul", "sse4.2")
#: In the last column of a row: go on with the CRC of the row before.
GO_ON = 1 << 32


def copy_checked(target: memoryview, source: Buffer, crc: int = 0) -> int:
    """Copy `source` to the beginning of `target`. Runs without the interpreter's lock.

    Parameters
    ----------
    target : writable buffer of bytes
        At least as long as `source`, and apart from it.
    crc : int
        CRC-32C of what is before.

    Returns
    -------
    int
        The CRC-32C of what is before and of the bytes that were written.

    Raises
    ------
    ValueError
        When `target` is too short or cannot be written to; nothing is copied then.
    """
    if not len(source):
        return crc
    row = (ctypes.c_uint64 * 4)(_place_for(target, len(source)), address_of(source), len(source), crc)
    _routine()(ctypes.addressof(row), 1)
    return row[3]


class Copies:
    """Many copies, made in one go: to hand the interpreter's lock over for each costs more than a small copy."""

    def __init__(self) -> None:
        self._rows = array("Q")

    def __len__(self) -> int:
        return len(self._rows) // 4

    def add(self, to: int, address: int, size: int, goes_on: bool) -> None:
        """`size` bytes, at least one, from `address` to `to`, in memory that the caller keeps alive (`address_of`).

        With `goes_on` the CRC is that of the bytes of the copy before and of these.
        """
        self._rows.extend((to, address, size, GO_ON if goes_on else 0))

    def move(self, distance: int) -> None:
        """Have everything go so many bytes behind where it was to go."""
        for row in range(0, len(self._rows), 4):
            self._rows[row] += distance

    def make(self) -> Sequence[int]:
        """Copy everything, in order. Returns the CRC-32C of each."""
        if self._rows:
            _routine()(self._rows.buffer_info()[0], len(self))
        return self._rows[3::4]


def copy_rows(rows: np.ndarray) -> None:
    """Copy as rows say, in order, in one go, without the interpreter's lock.

    Parameters
    ----------
    rows : uint64 [copies, 4]
        Contiguous: address to copy to, address to copy from, bytes (at least one), and CRC-32C of what is before, or `GO_ON`. The last is
        replaced by the CRC-32C of what is before and of the bytes that were written.
    """
    if len(rows):
        _routine()(address_of(rows), len(rows))


def prepare() -> None:
    """Have the machine code ready, which takes 0.1 s once: for a program's start, so that the first copy does not wait."""
    _routine()


def address_of(memory: Buffer | np.ndarray) -> int:
    """Where `memory`, which is not empty, begins. It means nothing any more once that is gone."""
    return np.frombuffer(memory, np.uint8).__array_interface__["data"][0]


def _place_for(target: memoryview, size: int) -> int:
    if len(target) < size:
        raise ValueError(f"{size} bytes cannot be copied to {len(target)}")
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(target))
    except TypeError:
        raise ValueError("bytes cannot be copied to read-only memory") from None


def _in_pieces(table: int, rows: int) -> None:
    """What the machine code does, without it."""
    crc = 0
    for row in ((ctypes.c_uint64 * 4) * rows).from_address(table):
        to, address, size, before = row
        crc = crc if before == GO_ON else before
        for at in range(0, size, _PIECE_BYTES):
            length = min(_PIECE_BYTES, size - at)
            ctypes.memmove(to + at, address + at, length)
            written = (ctypes.c_char * length).from_address(to + at)  # not of the source, to which others may write meanwhile
            crc = crc32c(written, crc)
        row[3] = crc


@cache
def _routine() -> Callable[[int, int], None]:
    """Takes the address of rows ``to | from | bytes | CRC before``, u64 each, and their number; leaves each CRC in the last column."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return _in_pieces
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    if not all(features.get(name) for name in _NEEDED):
        return _in_pieces
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()
    module = llvm.parse_assembly(_module())
    machine = llvm.Target.from_default_triple().create_target_machine(features=",".join(f"+{name}" for name in _NEEDED))
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    routine = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_uint64)(engine.get_function_address("copy_rows"))
    routine.engine = engine  # owns the code
    return routine


def _module() -> str:
    """LLVM's text of one function around the assembly."""
    touched = ["rsi", "rdi", "rax", "rcx", "rdx", "r8", "r9", "r10", *(f"xmm{i}" for i in range(14)), "memory", "dirflag", "fpsr", "flags"]
    constraints = ",".join(["{rdi}", "{rsi}", *(f"~{{{name}}}" for name in touched)])
    text = r"\0A".join(line.replace("$", "$$") for line in _assembly())
    return f"""
define void @copy_rows(i64 %table, i64 %rows) {{
  call void asm sideeffect "{text}", "{constraints}"(i64 %table, i64 %rows)
  ret void
}}"""


def _assembly() -> list[str]:
    """Row in r9, rows left in r10. A row's: to rdi, from rsi, bytes rdx, CRC eax."""
    return [
        "movq %rdi, %r9",
        "movq %rsi, %r10",
        "0:",
        "movq 0(%r9), %rdi",
        "movq 8(%r9), %rsi",
        "movq 16(%r9), %rdx",
        "movq 24(%r9), %rcx",
        "btq $32, %rcx",
        "cmovncl %ecx, %eax",  # else the CRC of the row before
        "notl %eax",
        *_copy_steps(),
        *_copy_rest(),
        "notl %eax",
        "movl %eax, %ecx",
        "movq %rcx, 24(%r9)",
        "addq $32, %r9",
        "decq %r10",
        "jne 0b",
    ]


def _copy_steps() -> list[str]:
    """As many whole steps as there are: remainders in xmm0 to xmm3, what they are multiplied by in xmm8."""
    remainders = range(4)
    return [
        f"cmpq ${_STEP}, %rdx",
        "jb 3f",
        *_multipliers(8 * _STEP),
        # The first 64 bytes are the remainders, with the CRC before them in the first four.
        *(f"movdqu {16 * i}(%rsi), %xmm{i}" for i in remainders),
        *(f"movdqu %xmm{i}, {16 * i}(%rdi)" for i in remainders),
        "movd %eax, %xmm9",
        "pxor %xmm9, %xmm0",
        *_advance(_STEP),
        f"cmpq ${_STEP}, %rdx",
        "jb 2f",
        "1:",
        f"prefetcht0 {_AHEAD}(%rsi)",
        *(f"movdqu {16 * i}(%rsi), %xmm{4 + i}" for i in remainders),
        *(f"movdqu %xmm{4 + i}, {16 * i}(%rdi)" for i in remainders),
        *(line for i in remainders for line in _fold(i, 4 + i)),
        *_advance(_STEP),
        f"cmpq ${_STEP}, %rdx",
        "jae 1b",
        "2:",
        *_multipliers(128),
        *(line for i in (1, 2, 3) for line in _fold(0, i)),
        # 128 bits that leave the same remainder as all before them.
        "xorl %eax, %eax",
        "movq %xmm0, %r8",
        "crc32q %r8, %rax",
        "psrldq $8, %xmm0",
        "movq %xmm0, %r8",
        "crc32q %r8, %rax",
    ]


def _copy_rest() -> list[str]:
    """What is less than a step: by 8 bytes, then one by one."""
    return [
        "3:",
        "cmpq $8, %rdx",
        "jb 4f",
        "movq (%rsi), %r8",
        "crc32q %r8, %rax",
        "movq %r8, (%rdi)",
        *_advance(8),
        "jmp 3b",
        "4:",
        "testq %rdx, %rdx",
        "je 5f",
        "movb (%rsi), %r8b",
        "crc32b %r8b, %eax",
        "movb %r8b, (%rdi)",
        *_advance(1),
        "jmp 4b",
        "5:",
    ]


def _fold(remainder: int, following: int) -> list[str]:
    """Move remainder xmm[remainder] on by as many bits as the multipliers are made for, and add xmm[following] to it."""
    spare = 9 + remainder
    return [
        f"movdqa %xmm{remainder}, %xmm{spare}",
        f"pclmulqdq $0x00, %xmm8, %xmm{remainder}",
        f"pclmulqdq $0x11, %xmm8, %xmm{spare}",
        f"pxor %xmm{spare}, %xmm{remainder}",
        f"pxor %xmm{following}, %xmm{remainder}",
    ]


def _multipliers(bits: int) -> list[str]:
    """xmm8: what the lower (earlier) and the upper half of 128 bits are multiplied by to move them on by `bits`."""
    lower, upper = _power(bits + 64 - 33), _power(bits - 33)
    return [f"movl ${lower}, %r8d", "movq %r8, %xmm8", f"movl ${upper}, %r8d", "movq %r8, %xmm13", "punpcklqdq %xmm13, %xmm8"]


def _power(exponent: int) -> int:
    """x to the `exponent` modulo the polynomial, bits reflected. A reflected product is one bit short, a 32-bit factor 32: hence - 33."""
    power = 1 << 31
    for _ in range(exponent):
        power = power >> 1 ^ (_POLYNOMIAL if power & 1 else 0)
    return power


def _advance(size: int) -> list[str]:
    return [f"addq ${size}, %rsi", f"addq ${size}, %rdi", f"subq ${size}, %rdx"]
