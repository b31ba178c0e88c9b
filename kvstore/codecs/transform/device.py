"""A batch of blocks through the transform codec on an accelerator: torch's matrix products, and kernels of our own around them.

Decoding stays on the device. The host makes a few flat arrays of what is coded where (`streams`) and sends them there with the streams in
one copy; how many kernels are started then depends on the groups of layers, not on the blocks. All streams are read first, by one
launch: that takes as long as the longest of them. Encoding computes the coefficients there and hands them to the host, where steps are
searched and streams written: the blob is host memory in the end, and publishing waits for nobody.

Legend: B blocks, T tokens a block, N = B·T, R coefficients, L model layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from kvstore.errors import CorruptBlockError
from kvstore.layout import KVLayout
from kvstore.rope import RopeSpec

from .groups import Group, gather
from .moments import unrotate
from .native import Transformed
from .payload import LayerPayload
from .projection import Projection
from .streams import Streams, upload


@dataclass(frozen=True, slots=True)
class Places:
    """Where the rows of a batch belong in K and V, and how their keys are turned.

    Parameters
    ----------
    target : int32 [N]
        Token of its block that a row belongs to; rows are in the order of coding.
    cos, sin : float32
        The tables of each different rotation of the model, [N, pairs] behind each other.
    ropes : int32 [L, 3]
        For each layer: pairs in the tables before its own, pairs in its own, whether they interleave.
    """

    target: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    ropes: torch.Tensor

    @classmethod
    def of(cls, layout: KVLayout, positions_BT: torch.Tensor, order_BT: torch.Tensor | None, device: torch.device) -> Places:
        specs, ropes = _rotations(layout)
        blocks, length = positions_BT.shape
        target = np.tile(np.arange(length), blocks) if order_BT is None else order_BT.reshape(-1).numpy()
        arrays = {"target": target.astype(np.int32), "ropes": ropes, "positions": positions_BT.numpy()}
        there = upload({name: [a] for name, a in arrays.items()}, device)
        tables = [spec.tables(there["positions"]) for spec in specs]
        cos, sin = (torch.cat([table.reshape(-1) for table in column]) for column in zip(*tables, strict=True))
        return cls(there["target"], cos, sin, there["ropes"])


@lru_cache(maxsize=8)
def _rotations(layout: KVLayout) -> tuple[list[RopeSpec], np.ndarray]:
    """The different rotations of a model, and `Places.ropes`."""
    specs: dict[RopeSpec, int] = {}
    before, ropes = 0, []
    for layer in range(layout.layers):
        spec = layout.rope.for_layer(layer)
        pairs = spec.rotary_dim // 2
        if spec not in specs:
            specs[spec], before = before, before + pairs
        ropes.append((specs[spec], pairs, spec.interleaved))
    return list(specs), np.array(ropes, dtype=np.int32)


class Decoded(Protocol):
    """What `Decoder.decode` gives."""

    #: int8, any shape: 0 for streams that no encoder writes. What values are made of those is garbage.
    intact: torch.Tensor

    def values(self, group: int, out_RN: torch.Tensor) -> None:
        """Values of a group's first coefficients into `out_RN`, where they are coded; nothing elsewhere."""


class Decoder(Protocol):
    """`triton_decoder.TritonDecoder`, or a stand-in of the tests. Nothing here waits for the device."""

    def decode(self, streams: Streams) -> Decoded:
        """Read all streams."""

    def place(
        self, group: Group, base: torch.Tensor, product: torch.Tensor, places: Places, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Rows ``base + product`` [N, columns] into the group's layers of K and V [B, L, H, T, D], RoPE applied."""


def transform(
    layout: KVLayout, projection: Projection, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, tokens_BT: torch.Tensor | None
) -> Transformed:
    """Coefficients of K and V [B, L, H, T, D], computed on their device and copied to the host."""
    positions, rows, out = positions.to(k.device), projection.rows(tokens_BT), Transformed([], [])
    for i, group in enumerate(projection.groups):
        mine, rope = slice(group.first, group.last), layout.rope.for_layers(group.first, group.last)
        x = gather(unrotate(rope, k[:, mine], positions), v[:, mine])
        x -= projection.base(i, rows, len(x))
        out.coefficients.append((projection.encoders[i].T @ x.T).cpu().numpy())
        halves = zip(x.split(group.width // 2, 1), projection.directions[i], strict=True)
        out.seen.append(torch.cat([half @ signs.to(x.device) for half, signs in halves], 1).cpu().numpy())
    return out


def restore(
    layout: KVLayout,
    projection: Projection,
    decoder: Decoder,
    payloads: Sequence[Sequence[LayerPayload]],
    exact: Sequence[bool],
    positions: torch.Tensor,
    tokens_BT: torch.Tensor | None,
    order_BT: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
) -> Iterator[Group]:
    """As `native.restore`. The groups are given once all streams are known to be intact; their values may still be on their way."""
    blocks, length = positions.shape
    streams = Streams.of(projection.kappa, payloads, exact, length)
    # What copies and waits for it comes before the long kernel.
    rows, places = projection.rows(tokens_BT), Places.of(layout, positions, order_BT, k.device)
    decoded = decoder.decode(streams)
    is_intact = _Answer(decoded.intact)
    for i, group in enumerate(projection.groups):
        d = projection.decoders[i][: streams.most_rows(i)]
        c_RN = torch.zeros(len(d), blocks * length, dtype=d.dtype, device=k.device)
        decoded.values(i, c_RN)
        decoder.place(group, projection.base(i, rows, blocks * length), c_RN.T @ d, places, k, v)
    if not is_intact.all():
        raise CorruptBlockError("the entropy-coded streams of a block are damaged")
    yield from projection.groups


class _Answer:
    """What a tensor holds at this point of the device's work, to be waited for later."""

    def __init__(self, x: torch.Tensor) -> None:
        self._event = torch.cuda.Event() if x.device.type == "cuda" else None
        self._here = torch.empty(x.shape, dtype=x.dtype, pin_memory=self._event is not None)
        self._here.copy_(x, non_blocking=True)
        if self._event:
            self._event.record(torch.cuda.current_stream(x.device))

    def all(self) -> bool:
        if self._event:
            self._event.synchronize()
        return bool(self._here.all())
