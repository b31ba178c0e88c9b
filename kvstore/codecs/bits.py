"""Runs of whole numbers in as many bits as each run needs."""

from __future__ import annotations

import numpy as np

from kvstore.block import Buffer
from kvstore.errors import CorruptBlockError

MAX_WIDTH = 15


def width_of(peak: np.ndarray) -> np.ndarray:
    """Bits that a run of signed numbers within ±`peak` needs; 0 for a run of zeros."""
    return np.ceil(np.log2(2.0 * peak + 1.0)).astype(np.int64)


def packed_bytes(widths: np.ndarray, length: int) -> int:
    """Bytes that `pack` makes of runs of `length` numbers; each run is filled up to whole bytes."""
    return int(((widths.astype(np.int64) * length + 7) // 8).sum())


def pack(runs_RN: np.ndarray, widths_R: np.ndarray) -> bytes:
    """Signed numbers, each run in its width, as bytes: first all runs of width 1, then of 2, … each in its order."""
    out = []
    for width in range(1, MAX_WIDTH + 1):
        runs = runs_RN[widths_R == width]
        if len(runs):
            codes = (runs.astype(np.int32) + (2 ** (width - 1) - 1)).astype(">u2")
            bits = np.unpackbits(codes.view(np.uint8).reshape(*codes.shape, 2), axis=-1)[..., 16 - width :]
            out.append(np.packbits(bits.reshape(len(runs), -1), axis=1).tobytes())
    return b"".join(out)


def unpack(data: Buffer, widths_R: np.ndarray, length: int) -> np.ndarray:
    """The inverse of `pack`, as int16 [R, length].

    Raises
    ------
    CorruptBlockError
        When `data` is not exactly as long as the widths say, before anything is allocated.
    """
    view = np.frombuffer(data, np.uint8)
    if int(widths_R.max(initial=0)) > MAX_WIDTH or len(view) != packed_bytes(widths_R, length):
        raise CorruptBlockError(f"{len(view)} bytes of packed numbers do not fit their widths")
    out = np.zeros((len(widths_R), length), np.int16)
    at = 0
    for width in range(1, MAX_WIDTH + 1):
        rows = np.flatnonzero(widths_R == width)
        size = (width * length + 7) // 8
        if len(rows):
            part = view[at : at + len(rows) * size].reshape(len(rows), size)
            bits = np.unpackbits(part, axis=1, count=width * length).reshape(len(rows), length, width)
            codes = np.zeros((len(rows), length), np.int16)
            for plane in range(width):
                codes = codes << 1 | bits[..., plane]
            out[rows] = codes - (2 ** (width - 1) - 1)
            at += len(rows) * size
    return out
