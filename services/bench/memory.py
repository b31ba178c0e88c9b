"""The most memory that a call takes while it runs: the host's as Linux counts it, a GPU's as torch does."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

_RESET_PEAK = "5"


def peak_extra_bytes(call: Callable[[], object], device: str = "cpu") -> int | None:
    """How far the memory in use on `device` rises above what it was before `call`; None where the system does not tell.

    On the CPU that is the resident memory. What is free inside the allocator is given back first, or it would hide what the call takes
    (proc(5), ``clear_refs``).
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")
        before = _status_bytes("VmRSS")
    except (OSError, AttributeError):
        return None
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))
