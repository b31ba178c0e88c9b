"""Many blocks at once between host memory and an accelerator.

Pinned memory is copied at the bus's speed while both processors go on; ordinary memory the driver copies once more, and waits. On CUDA
the copies run on a stream of their own beside the arithmetic on the caller's. torch keeps pinned memory for the next call, and hands it out
again only when the copies that were begun with it are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from kvstore.block import Buffer

from .parallel import spread

#: Bytes that one thread copies at a time.
_PIECE_BYTES = 2 << 20


def upload(parts: Sequence[Buffer], device: torch.device) -> torch.Tensor:
    """Buffers of the same size as uint8 [parts, bytes] on `device`, for work on its current stream. They may be changed afterwards."""
    sources = [np.frombuffer(part, np.uint8) for part in parts]
    size = len(sources[0])
    staged = _host_memory(len(parts) * size, device).view(len(parts), size)
    pieces = [(row, source, at) for row, source in zip(staged.numpy(), sources, strict=True) for at in range(0, size, _PIECE_BYTES)]
    spread(_copy_piece, pieces)
    if device.type != "cuda":
        return staged.to(device)
    here, aside = torch.cuda.current_stream(device), _stream(device, "up")
    with torch.cuda.stream(aside):
        data = staged.to(device, non_blocking=True)
    here.wait_stream(aside)
    data.record_stream(here)
    return data


class Downloads:
    """Copies from a device to the host that run while the device goes on. What `rows` gives is read only after `wait`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def rows(self, x: torch.Tensor) -> list[torch.Tensor]:
        """``x[0]``, ``x[1]``, … on the host, each in memory of its own, so that it can be given back alone."""
        hosts = [_host_memory(row.numel() * row.itemsize, self._device).view(row.dtype).view(row.shape) for row in x]
        if self._device.type != "cuda":
            return [host.copy_(row) for host, row in zip(hosts, x, strict=True)]
        aside = _stream(self._device, "down")
        aside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(aside):
            for host, row in zip(hosts, x, strict=True):
                host.copy_(row, non_blocking=True)
        x.record_stream(aside)
        return hosts

    def wait(self) -> None:
        """Until everything that was asked for is on the host."""
        if self._device.type == "cuda":
            _stream(self._device, "down").synchronize()


def _copy_piece(piece: tuple[np.ndarray, np.ndarray, int]) -> None:
    target, source, at = piece
    target[at : at + _PIECE_BYTES] = source[at : at + _PIECE_BYTES]


def _host_memory(size: int, device: torch.device) -> torch.Tensor:
    """uint8 [size] on the host, pinned where `device` gains by it."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")


@cache
def _stream(device: torch.device, way: str) -> torch.cuda.Stream:
    """One a device and way for all calls: torch keeps freed memory for each stream apart."""
    return torch.cuda.Stream(device)
