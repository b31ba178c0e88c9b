"""Between buffers of bytes and tensors, without a copy where the device allows."""

from __future__ import annotations

import numpy as np
import torch

from kvstore.block import Buffer


class _Lent:
    """Read-only memory, presented to numpy as writable: torch warns about arrays that are not, and decoders only read."""

    def __init__(self, data: np.ndarray) -> None:
        self.owner = data
        self.__array_interface__ = {**data.__array_interface__, "data": (data.ctypes.data, False)}


def tensor_from_buffer(buffer: Buffer, device: torch.device | str = "cpu") -> torch.Tensor:
    """`buffer` as a uint8 tensor [bytes] on `device`; on the CPU it references the buffer and must not be written.

    A payload may lie at any address, so parts of it are viewed as wider types only through `wide`.
    """
    return torch.from_numpy(np.asarray(_Lent(np.frombuffer(buffer, dtype=np.uint8)))).to(device)


def wide(part: torch.Tensor, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A copy of the uint8 tensor `part`, aligned, as `dtype` in `shape`."""
    flat = torch.empty(part.numel(), dtype=torch.uint8, device=part.device)
    flat.view(part.shape).copy_(part)
    return flat.view(dtype).view(shape)


def bytes_of(*parts: torch.Tensor) -> bytes:
    """Tensors [L, …] as bytes: for each first index, that index of every part in turn. So each model layer lies together."""
    return rows_of(*parts).cpu().numpy().tobytes()


def rows_of(*parts: torch.Tensor) -> torch.Tensor:
    """Tensors [L, …] as uint8 [L, bytes]: in each row, that index of every part in turn."""
    return torch.cat([p.contiguous().flatten().view(torch.uint8).view(p.shape[0], p[0].numel() * p.itemsize) for p in parts], 1)
