"""Many blocks at once between host memory and an accelerator.

Pinned memory is copied at the bus's speed while both processors go on; ordinary memory the driver copies once more, and waits. On CUDA
the copies run on a stream of their own beside the arithmetic on the caller's. torch keeps pinned memory for the next call, and hands it out
again only when the copies that were begun with it are done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache

import numpy as np
import torch

from kvstore.block import Buffer

from .parallel import begin

#: Bytes that one thread copies at a time.
_PIECE_BYTES = 2 << 20


def uploads(batches: Iterable[Sequence[Buffer]], device: torch.device) -> Iterator[torch.Tensor]:
    """Each batch of buffers of one size as uint8 [buffers, bytes] on `device`, for work on its current stream.

    While the caller works with one batch the next is gathered in pinned memory. The buffers may be changed when all have been given.
    """
    ahead: Callable[[], torch.Tensor] | None = None
    for parts in batches:
        here, ahead = ahead, _begin_upload(parts, device)
        if here is not None:
            yield here()
    if ahead is not None:
        yield ahead()


def _begin_upload(parts: Sequence[Buffer], device: torch.device) -> Callable[[], torch.Tensor]:
    sources = [np.frombuffer(part, np.uint8) for part in parts]
    size = len(sources[0])
    staged = _host_memory(len(parts) * size, device).view(len(parts), size)
    rows = zip(staged.numpy(), sources, strict=True)
    gathered = begin(_copy_piece, ((row, source, at) for row, source in rows for at in range(0, size, _PIECE_BYTES)))

    def send() -> torch.Tensor:
        gathered()
        if device.type != "cuda":
            return staged.to(device)
        here, aside = torch.cuda.current_stream(device), _stream(device, "up")
        with torch.cuda.stream(aside):
            data = staged.to(device, non_blocking=True)
        here.wait_stream(aside)
        data.record_stream(here)
        return data

    return send


def begin_download(*parts: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    """Copies of tensors on the host, each in memory of its own, so that it can be given back alone.

    They are made while the device goes on; what this returns waits for them and gives them.
    """
    device = parts[0].device
    hosts = [_host_memory(part.numel() * part.itemsize, device).view(part.dtype).view(part.shape) for part in parts]
    if device.type != "cuda":
        for host, part in zip(hosts, parts, strict=True):
            host.copy_(part)
        return lambda: hosts
    aside, done = _stream(device, "down"), torch.cuda.Event()
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for host, part in zip(hosts, parts, strict=True):
            host.copy_(part, non_blocking=True)
            part.record_stream(aside)
        done.record()

    def arrived() -> list[torch.Tensor]:
        done.synchronize()
        return hosts

    return arrived


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
