"""The yardstick of one GPU: copies between pinned memory of the host and the GPU's own, one value after the other."""

from __future__ import annotations

import torch

from .base import Store, Values


class Pinned(Store):
    """Puts the values on the GPU, and gets them back, as fast as the bus allows."""

    def __init__(self, values: Values, where: dict) -> None:
        super().__init__(values, where)
        shape = (values.count, values.size_bytes)
        self._there = torch.empty(shape, dtype=torch.uint8, device=where["device"])
        self._here = torch.empty(shape, dtype=torch.uint8, pin_memory=True)

    def put(self) -> None:
        self._copy(self._there, self._here)

    def get(self) -> None:
        self._copy(self._here, self._there)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        for to, value in zip(target, source, strict=True):
            to.copy_(value, non_blocking=True)
        torch.cuda.synchronize(self._there.device)
