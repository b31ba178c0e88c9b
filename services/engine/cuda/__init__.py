"""Forwards on a GPU: attention over pages by Triton kernels, row counts that never change, and recorded launches (CUDA graphs).

A matrix product gives a row other bits when the number of rows changes. So here every prefill forward has one number of rows and every
decode forward another, whoever is in it; what is left over is padding that writes nothing. `triton` is optional: without it the
engine computes with torch alone, in the same row counts.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch

from services.engine.live import LivePool

#: Changes with the bits that the kernels here give.
KERNELS = "1"
#: Products of a row's number and a weight in a step: what a large GPU computes in about the time that it takes to start the kernels of a
#: small model's step. For a large model it takes the time to read the weights for about `LEAST_ROWS`.
STEP_PRODUCTS, LEAST_ROWS, MOST_ROWS = 300 * 10**9, 256, 1024
#: Channels of a head up to which a program's share of K and V fits into a multiprocessor's shared memory.
MAX_HEAD_DIM = 256


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def can_attend(pool: LivePool) -> bool:
    """Whether such caches can be attended to by the kernels: on a GPU, with `triton` installed and heads that are not too large."""
    return pool.device.type == "cuda" and pool.layout.head_dim <= MAX_HEAD_DIM and has_triton()


def facts(pool: LivePool, prefill: int) -> dict[str, str]:
    """What decides bits on a GPU beside the machine: nothing on a CPU."""
    if pool.device.type == "cpu":
        return {}
    triton = {"triton": importlib.metadata.version("triton"), "kernels": KERNELS} if has_triton() else {}
    return triton | {"prefill": str(prefill), "attends": str(can_attend(pool))}


def prefill_rows(device: torch.device, tile: int, most_tiles: int, most_rows: int, weights: int) -> int:
    """Rows of every prefill forward: a power of two times the tile, of at most so many tiles and rows, at least a tile.

    With `most_rows` 0 as many as a model of so many weights computes in little more time than one. 0 on a CPU, where forwards have as
    many rows as there are tokens.
    """
    if device.type != "cuda":
        return 0
    most_rows = most_rows or min(max(STEP_PRODUCTS // weights, LEAST_ROWS), MOST_ROWS)
    tiles = max(1, min(most_tiles, most_rows // tile))
    return tile << (tiles.bit_length() - 1)
