"""What calibration learnt about one model: a self-contained safetensors file, named by its digest (DESIGN §5).

A profile decodes together with a blob and its tokens, nothing of the model. Its digest covers every tensor and every word of its
metadata, and stands in the header of each block that was written with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from kvstore.errors import ConfigError, InvalidInputError, LayoutMismatchError
from kvstore.identity import digest
from kvstore.layout import KVLayout

FORMAT = 1
_KEY = "concertina"

Shape = tuple[int, int, int, str]


def shape_of(layout: KVLayout) -> Shape:
    """What a profile must share with the caches it serves."""
    return layout.layers, layout.kv_heads, layout.head_dim, layout.rope.canonical()


class Profile:
    """Tensors and facts of one calibration. Immutable by convention; equal content has an equal digest.

    Parameters
    ----------
    shape : (layers, kv_heads, head_dim, rope)
        What it was made for, as `shape_of` gives it; the dtype does not matter.
    facts : mapping
        Small JSON-serializable values: calibration's settings and results.
    tensors : mapping of str to Tensor
        On the CPU.
    """

    def __init__(self, shape: Shape, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        self.facts = dict(facts)
        self.tensors = {name: t.detach().cpu().contiguous() for name, t in sorted(tensors.items())}
        self.shape = shape
        parts = [self._metadata().encode()]
        for name, t in self.tensors.items():
            parts += [name.encode(), str(t.dtype).encode(), str(list(t.shape)).encode(), t.reshape(-1).view(torch.uint8).numpy().tobytes()]
        self._digest = digest(*parts)

    @property
    def digest(self) -> bytes:
        """32 bytes that name this profile."""
        return self._digest

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors: the cost that ratios leave out."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def check(self, layout: KVLayout) -> None:
        """Raise LayoutMismatchError if this profile was made for another shape or rotation."""
        wanted = shape_of(layout)
        if wanted[:3] != self.shape[:3]:
            raise LayoutMismatchError(f"the profile is for (layers, heads, head dim) {self.shape[:3]}, the model has {wanted[:3]}")
        if wanted[3] != self.shape[3]:
            raise LayoutMismatchError("the profile was made for another rotary embedding; calibrate this model")

    def _metadata(self) -> str:
        return json.dumps({"format": FORMAT, "shape": list(self.shape), "facts": self.facts}, sort_keys=True)

    def to_bytes(self) -> bytes:
        """The safetensors file."""
        return save(self.tensors, metadata={_KEY: self._metadata()})

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_bytes(self.to_bytes())
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile.

        Raises
        ------
        ConfigError
            If there is no such file.
        InvalidInputError
            If it is not a profile of this format.
        """
        try:
            return cls.from_bytes(Path(path).read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot read the profile {path}: {error.strerror}; make one with `concertina calibrate`") from error

    @classmethod
    def from_bytes(cls, data: bytes) -> Profile:
        """The inverse of `to_bytes`. Raises InvalidInputError for anything else."""
        try:
            header_bytes = int.from_bytes(data[:8], "little")
            meta = json.loads(json.loads(data[8 : 8 + header_bytes])["__metadata__"][_KEY])
            tensors = load(data)
            layers, heads, dim, rope = meta["shape"]
            known = meta["format"] == FORMAT
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InvalidInputError(f"not a profile of format {FORMAT}: {error!r}; make one with `concertina calibrate`") from error
        if not known:
            raise InvalidInputError(f"the profile has format {meta['format']}, this version reads {FORMAT}; calibrate again")
        return cls((layers, heads, dim, rope), meta["facts"], tensors)
