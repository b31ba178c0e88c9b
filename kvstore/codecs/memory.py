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

    Its storage is aligned for any dtype that a format may view it as: a view at an odd place of a larger blob is copied.
    """
    data = np.frombuffer(buffer, dtype=np.uint8)
    if data.ctypes.data % 8:
        data = data.copy()
    return torch.from_numpy(np.asarray(_Lent(data))).to(device)
