"""Codecs of a fixed payload size: block by block on the CPU, many blocks at once on an accelerator.

There a call's cost is its kernels, its waits and the bus. So a pass of torch operations takes several blocks together, payloads travel
beside the passes (`transfer.py`), and the host asks for everything before it waits: for the payloads of an encoding, of which the first
are handed on while the last are computed, or for the checks of a decoding.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from kvstore.block import SECTIONS, Distortion, EncodedBlock
from kvstore.errors import CorruptBlockError
from kvstore.rope import NO_ROPE

from .base import Codec, Coded, OnLayers, Stored, relative
from .transfer import begin_download, uploads

#: Of K and V together in one pass: an encoder's temporaries take up to 16 bytes for each.
_PASS_VALUES = 16 << 20


class BatchedCodec(Codec):
    """Template: a subclass encodes and decodes a list of blocks on the CPU, and a pass of blocks of equal size on any device.

    The payload is that of the model's layers, one behind the other.
    """

    layer_major = True

    @abstractmethod
    def _encode_on_cpu(self, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor, starts: Sequence[int]) -> list[Coded]: ...

    @abstractmethod
    def _decode_on_cpu(self, blocks: Sequence[Stored], k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor) -> None: ...

    @abstractmethod
    def _encode_pass(self, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Payloads uint8 [B, bytes], the same as `_encode_on_cpu` gives, and `squares` of K and of V, float32 [B, 2, 2].

        `start` is that of the first block; the others are such that their payloads have the same size.
        """

    @abstractmethod
    def _decode_pass(self, payloads: torch.Tensor, start: int, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor) -> torch.Tensor:
        """Write the values of payloads [B, bytes]. Returns whether they are ones that an encoder can have written, bool []."""

    def _encode(
        self, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor, starts: Sequence[int], tokens_BT: torch.Tensor | None
    ) -> Iterable[Coded]:
        encode = self._encode_on_cpu if k_BLHTD.device.type == "cpu" else self._encode_in_passes
        return encode(k_BLHTD, v_BLHTD, starts)

    def _decode(self, blocks: Sequence[Stored], tokens_BT: torch.Tensor | None, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor) -> None:
        decode = self._decode_on_cpu if k_BLHTD.device.type == "cpu" else self._decode_in_passes
        decode(blocks, k_BLHTD, v_BLHTD)

    def _decode_when_ready(
        self, blocks: Sequence[EncodedBlock], stored: Sequence[Stored], tokens_BT: torch.Tensor | None, k_BLHTD: torch.Tensor,
        v_BLHTD: torch.Tensor, on_layers: OnLayers, ready: OnLayers | None,
    ) -> None:  # fmt: skip
        """Section by section, where all blocks have them: the payload of each is that of a block with so many layers."""
        headers = [block.header for block in blocks]
        if ready is None or not all(header.sections for header in headers):
            super()._decode_when_ready(blocks, stored, tokens_BT, k_BLHTD, v_BLHTD, on_layers, ready)
            return
        for number in range(SECTIONS):
            first, last = headers[0].layers_before(number), headers[0].layers_before(number + 1)
            codec = type(self)(replace(self.layout, layers=last - first, rope=NO_ROPE), self.profile, self.config)
            ready(last)
            parts = [slice(*header.section(number)) for header in headers]
            cut = [Stored(s.start, s.tokens, (s.layers[0][part],)) for s, part in zip(stored, parts, strict=True)]
            codec._decode(cut, None, k_BLHTD[:, first:last], v_BLHTD[:, first:last])
            on_layers(last)

    def _encode_in_passes(self, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor, starts: Sequence[int]) -> Iterator[Coded]:
        passes = []
        for part in self._passes(starts, k_BLHTD.shape[3]):
            payloads, sums = self._encode_pass(k_BLHTD[part], v_BLHTD[part], starts[part.start])
            passes.append(begin_download(*payloads, sums))
        for arrived in passes:
            *hosts, sums = arrived()
            for host, both in zip(hosts, sums.tolist(), strict=True):
                yield Coded((memoryview(host.numpy()).toreadonly(),), (Distortion(*(relative(*pair) for pair in both)),))

    def _decode_in_passes(self, blocks: Sequence[Stored], k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor) -> None:
        starts, intact = [block.start for block in blocks], []
        passes = list(self._passes(starts, blocks[0].tokens))
        payloads = uploads(([block.layers[0] for block in blocks[part]] for part in passes), k_BLHTD.device)
        for part, data in zip(passes, payloads, strict=True):
            intact.append(self._decode_pass(data, starts[part.start], k_BLHTD[part], v_BLHTD[part]))
        if not bool(torch.stack(intact).all()):
            raise CorruptBlockError(f"a number of a {self.name!r} block is not finite")

    def _passes(self, starts: Sequence[int], tokens: int) -> Iterator[slice]:
        """Runs of blocks whose payloads have the same size, as many as a pass takes."""
        most = max(1, _PASS_VALUES // (self.layout.values_per_token * tokens))
        first = 0
        for i in range(1, len(starts) + 1):
            if i == len(starts) or i - first == most or self._layer_bytes(starts[i], tokens) != self._layer_bytes(starts[first], tokens):
                yield slice(first, i)
                first = i


def squares(x_BLHTD: torch.Tensor, decoded_BLHTD: torch.Tensor) -> torch.Tensor:
    """Sum of squared errors and sum of squares of each block, float32 [B, 2]."""
    dims, error = tuple(range(1, x_BLHTD.ndim)), x_BLHTD.float() - decoded_BLHTD
    return torch.stack([torch.linalg.vector_norm(x, dim=dims, dtype=torch.float32) for x in (error, x_BLHTD)], 1).square()
