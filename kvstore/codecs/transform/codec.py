"""``transform``: the flagship. Eight to thirty-two times smaller, by what calibration knows about the model.

::

    K, V ── un-rotate K ── minus what the token predicts ── project on the basis ── quantize in nested passes ── rANS
                                     (projection)                          (classes, ladder, kernels, coder)

Errors are white in a space where a unit of error does a unit of harm: weighted by the tempered Fisher information of each head, as
calibration measured it. One quantizer step serves all coefficients (reverse water-filling); coefficients too small for it cost nothing.
Each layer of precision is a pass of finer steps over the one before. No dependence between blocks, nor between groups of layers.

Sources: transform coding of KV caches, KVTC (arXiv 2511.01815); entropy-coded KV, CacheGen (arXiv 2310.07240); attention sinks,
StreamingLLM (arXiv 2309.17453). Ours: Fisher weights, prediction from embeddings, K and V of layer groups jointly, cell-cutting layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from kvstore.block import MAX_FIDELITIES, BlockHeader, Distortion, EncodedBlock, LayerInfo
from kvstore.errors import ConfigError, CorruptBlockError, InvalidInputError
from kvstore.layout import KVLayout

from ..base import Codec, Coded, OnLayers, Stored
from ..parallel import spread
from . import device, native, rate
from .classes import TokenClasses, arranged, harms, most_classes, packed_bytes
from .coder import BlockEncoder
from .payload import LayerPayload
from .projection import Projection

#: Ratio of the coarsest layer that is made unless asked otherwise.
COARSEST = 32.0
#: Step indices between layers when a divergence is asked for instead of a ratio: about a factor of two in bytes.
DIVERGENCE_DROP = 42
#: Most values that are transformed at once (2,048 tokens of the default model); bounds the memory beside the result.
CHUNK_VALUES = 24 << 20
#: Those that are decoded at once on an accelerator: its time depends on the longest stream more than on their number.
DEVICE_CHUNK_VALUES = 160 << 20
MAX_BLOCK_TOKENS = 1024


class TransformCodec(Codec):
    """Calibrated transform coding with layered fidelity."""

    name = "transform"
    wire_id = 7
    uses_profile = True
    needs_tokens = True
    layerwise = True

    @dataclass(frozen=True)
    class Config:
        """Options.

        Parameters
        ----------
        ratio : float
            Bytes of K and V at 2 bytes a value over bytes of the whole blob.
        layers : tuple of float, optional
            Ratio at each layer of precision, coarsest first, the last one `ratio`. By default `ratio` and its doubles up to 32.
        max_divergence : float, optional
            Quantize as coarsely as the profile's estimate of the harm (nats a token) allows, instead of by `ratio`.
        """

        ratio: float = 8.0
        layers: tuple[float, ...] | None = None
        max_divergence: float | None = None

        def __post_init__(self) -> None:
            if not 1.0 <= self.ratio <= 1000:
                raise ConfigError(f"ratio must be from 1 to 1000, not {self.ratio}")
            if self.max_divergence is not None and not self.max_divergence > 0:
                raise ConfigError(f"max_divergence must be positive, not {self.max_divergence}")
            rungs = self.rungs
            if not 1 <= len(rungs) <= MAX_FIDELITIES or rungs[-1] != self.ratio or any(a <= b for a, b in pairwise(rungs)):
                raise ConfigError(f"layers must be 1 to {MAX_FIDELITIES} falling ratios, the last one {self.ratio:g}, not {self.layers}")

        @property
        def rungs(self) -> tuple[float, ...]:
            """Ratio at each fidelity, coarsest first."""
            if self.layers is not None:
                return tuple(float(r) for r in self.layers)
            rungs = [self.ratio]
            while len(rungs) < 3 and rungs[0] * 2 <= COARSEST:
                rungs.insert(0, rungs[0] * 2)
            return tuple(rungs)

    def __init__(self, layout: KVLayout, profile: Any = None, config: Any = None) -> None:
        super().__init__(layout, profile, config)
        self.needs_tokens = Projection.of(self.profile, layout).predicts

    # ------------------------------------------------------------------------------------------------------------- encode

    def _encode(self, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor, starts: Sequence[int], tokens_BT: torch.Tensor | None) -> list[Coded]:
        if k_BLHTD.shape[3] > MAX_BLOCK_TOKENS:
            raise InvalidInputError(f"codec {self.name!r} takes blocks of at most {MAX_BLOCK_TOKENS} tokens, not {k_BLHTD.shape[3]}")
        out: list[Coded] = []
        per = max(1, CHUNK_VALUES // (self.layout.values_per_token * k_BLHTD.shape[3]))
        for at in range(0, len(starts), per):
            chunk = slice(at, at + per)
            out += self._encode_chunk(k_BLHTD[chunk], v_BLHTD[chunk], starts[chunk], None if tokens_BT is None else tokens_BT[chunk])
        return out

    def _encode_chunk(self, k: torch.Tensor, v: torch.Tensor, starts: Sequence[int], tokens: torch.Tensor | None) -> list[Coded]:
        length = k.shape[3]
        projection = Projection.of(self.profile, self.layout, k.device)
        transform = native.transform if k.device.type == "cpu" else device.transform
        classes, positions = self._classes(projection, k, v, starts), self._positions(starts, length)
        if projection.harm is not None:
            order = _orders(classes, length)
            k, v, positions = arranged(k, order), arranged(v, order), positions.gather(1, order)
            tokens = None if tokens is None else tokens.cpu().gather(1, order)
        made = transform(self.layout, projection, k, v, positions, tokens)
        energy = torch.stack([x.flatten(1).norm(dim=1, dtype=torch.float32).square() for x in (k, v)], 1).tolist()

        def one(b: int) -> Coded:
            sink = self._exact(k[b], v[b]) if starts[b] == 0 else (b"", False)
            mine = slice((b + 1) * length - len(classes[b].of), (b + 1) * length)
            seen, coefficients = [z[mine] for z in made.seen], [c[:, mine] for c in made.coefficients]
            encoder = BlockEncoder(projection.models, projection.kappa, projection.shape, coefficients, classes[b])
            return self._encode_block(projection, encoder, seen, starts[b], sink, energy[b])

        return spread(one, range(len(starts)))

    def _classes(self, projection: Projection, k: torch.Tensor, v: torch.Tensor, starts: Sequence[int]) -> list[TokenClasses]:
        """The classes of each block's tokens but an exact first one."""
        length, sinks = k.shape[3], [start == 0 for start in starts]
        if projection.harm is None:
            return [TokenClasses.alike(length - sink) for sink in sinks]
        most = most_classes(self.layout.raw_bytes(length) / self.config.rungs[0], len(projection.groups))
        return [TokenClasses.by(harm_T[sink:], most) for harm_T, sink in zip(harms(projection.harm, k, v), sinks, strict=True)]

    @staticmethod
    def _positions(starts: Sequence[int], length: int) -> torch.Tensor:
        return torch.tensor(starts)[:, None] + torch.arange(length)

    @staticmethod
    def _exact(k_LHTD: torch.Tensor, v_LHTD: torch.Tensor) -> tuple[bytes, bool]:
        """The first token's K and V at 16 bits a value, and whether that is bfloat16: float32 fits float16 better unless it is large."""
        first = torch.cat([k_LHTD[:, :, 0].flatten(), v_LHTD[:, :, 0].flatten()])
        large = first.dtype == torch.bfloat16 or bool(first.abs().max() > torch.finfo(torch.float16).max)
        return first.to(torch.bfloat16 if large else torch.float16).view(torch.uint8).cpu().numpy().tobytes(), large

    def _encode_block(
        self, projection: Projection, encoder: BlockEncoder, seen: list[np.ndarray], start: int, sink: tuple[bytes, bool],
        energy: Sequence[float],
    ) -> Coded:
        rungs, (exact, bfloat16), length = self.config.rungs, sink, encoder.tokens + bool(sink[0])
        beside = len(exact) + (packed_bytes(encoder.tokens) if len(encoder.runs) > 1 else 0)
        raw, spent, count = self.layout.raw_bytes(length), self._header_bytes(len(rungs)), encoder.tokens * self.layout.values_per_token
        steps = self._steps_for_divergence(projection, encoder, len(rungs)) if self.config.max_divergence is not None else None
        layers, distortions, divergences = [], [], []
        for i, ratio in enumerate(rungs):
            if steps is None:
                budget = rate.budget_bytes(raw, ratio, length, start, self.layout.raw_bytes(1)) - spent - (beside if i == 0 else 0)
                # How far this block is from the usual shows in the layer before.
                unusual = encoder.steps[-1] - projection.guess(rungs[i - 1]) if i else 0
                made = encoder.layer_within(budget, projection.guess(ratio) + unusual)
            else:
                made = encoder.layer_at(steps[i])
            classes = encoder.classes if len(encoder.runs) > 1 else None
            first = replace(made, exact=exact, bfloat16=bfloat16, classes=classes) if i == 0 else made
            layers.append(first.to_bytes())
            spent += len(layers[-1])
            missing = [z.copy() for z in seen]
            divergences.append(projection.expected_divergence(encoder.lost(projection.sketches, missing), count))
            distortions.append(projection.distortion(missing, energy))
        return Coded(tuple(layers), tuple(distortions), tuple(divergences))

    def _steps_for_divergence(self, projection: Projection, encoder: BlockEncoder, count: int) -> list[int]:
        """Step indices of the layers, the last one as coarse as `max_divergence` allows."""
        nothing = [np.zeros((encoder.tokens, 0), dtype=np.float32) for _ in projection.groups]
        no_sketch = [np.zeros((g.width, 0), dtype=np.float32) for g in projection.groups]

        def harm(m: int) -> float:
            trial = encoder.again()
            trial.layer_at(m)
            return projection.expected_divergence(trial.lost(no_sketch, nothing), encoder.tokens * self.layout.values_per_token)

        limit, coarsest = self.config.max_divergence, projection.guess(COARSEST * 8)
        finest = min(max(projection.guess(1.5), encoder.finest), coarsest)
        # The harm falls with finer steps as a price falls with coarser ones.
        m = -rate.cheapest_within(lambda n: harm(-n), limit, -projection.guess(self.config.ratio), -coarsest, -finest)
        m -= m > finest and harm(m) > limit  # the search may be a fraction of a step off
        return [m + DIVERGENCE_DROP * i for i in reversed(range(count))]

    def _header_bytes(self, fidelities: int) -> int:
        row = LayerInfo(0, 0, Distortion(0.0, 0.0))
        lay = self.layout
        return BlockHeader(self.wire_id, 1, lay.layers, lay.kv_heads, lay.head_dim, 0, 1, (row,) * fidelities, fidelities).header_bytes

    # ------------------------------------------------------------------------------------------------------------- decode

    def _stored(self, block: EncodedBlock, fidelity: int | None) -> Stored:
        if block.header.tokens > MAX_BLOCK_TOKENS:
            raise CorruptBlockError(f"a block of {block.header.tokens} tokens; codec {self.name!r} writes at most {MAX_BLOCK_TOKENS}")
        return super()._stored(block, fidelity)

    def _decode(self, blocks: Sequence[Stored], tokens_BT: torch.Tensor | None, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor) -> None:
        self._decode_by_layers(blocks, tokens_BT, k_BLHTD, v_BLHTD, lambda layers: None)

    def _decode_by_layers(
        self, blocks: Sequence[Stored], tokens_BT: torch.Tensor | None, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor, on_layers: OnLayers
    ) -> None:
        most = CHUNK_VALUES if k_BLHTD.device.type == "cpu" else DEVICE_CHUNK_VALUES
        per = max(1, most // (self.layout.values_per_token * blocks[0].tokens))
        for at in range(0, len(blocks), per):
            chunk, last = slice(at, at + per), at + per >= len(blocks)
            tokens = None if tokens_BT is None else tokens_BT[chunk]
            self._decode_chunk(blocks[chunk], tokens, k_BLHTD[chunk], v_BLHTD[chunk], on_layers if last else lambda layers: None)

    def _decode_chunk(
        self, blocks: Sequence[Stored], tokens: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, on_layers: OnLayers
    ) -> None:
        projection = Projection.of(self.profile, self.layout, k.device)
        parsed, length = [self._parsed(b, len(projection.groups)) for b in blocks], k.shape[3]
        positions, order = self._positions([b.start for b in blocks], length), None
        if any(layers[0].classes for layers in parsed):
            coded = [length - (b.start == 0) for b in blocks]
            order = _orders([layers[0].classes or TokenClasses.alike(n) for layers, n in zip(parsed, coded, strict=True)], length)
            positions, tokens = positions.gather(1, order), None if tokens is None else tokens.cpu().gather(1, order)
        batch = parsed, [b.start == 0 for b in blocks], positions, tokens, order, k, v
        if k.device.type == "cpu":
            restored = native.restore(self.layout, projection, *batch)
        else:
            restored = device.restore(self.layout, projection, projection.decoder, *batch)
        starts = [b for b, block in enumerate(blocks) if block.start == 0]
        exact = [(b, *self._exact_of(parsed[b][0], k)) for b in starts]
        for group in restored:
            mine = slice(group.first, group.last)
            for b, k_LHD, v_LHD in exact:
                k[b, mine, :, 0], v[b, mine, :, 0] = k_LHD[mine], v_LHD[mine]
            on_layers(group.last)

    def _parsed(self, block: Stored, groups: int) -> list[LayerPayload]:
        sink = self.layout.raw_bytes(1) if block.start == 0 else 0
        base = LayerPayload.from_bytes(block.layers[0], groups, sink, block.tokens - bool(sink))
        return [base, *(LayerPayload.from_bytes(data, base.runs) for data in block.layers[1:])]

    @staticmethod
    def _exact_of(layer: LayerPayload, k_BLHTD: torch.Tensor) -> torch.Tensor:
        """K and V of the first token, [2, L, H, D] of the type and on the device of the cache."""
        dtype = torch.bfloat16 if layer.bfloat16 else torch.float16
        first = torch.frombuffer(bytearray(layer.exact), dtype=dtype).to(k_BLHTD.device, k_BLHTD.dtype)
        _, layers, heads, _, dim = k_BLHTD.shape
        return first.view(2, layers, heads, dim)


def _orders(classes: Sequence[TokenClasses], length: int) -> torch.Tensor:
    """Where each block's tokens lie in it, in the order of coding, an exact first one in front: int64 [B, length]."""
    skips = [length - len(c.of) for c in classes]
    return torch.from_numpy(np.stack([np.append(np.arange(skip), skip + c.order) for c, skip in zip(classes, skips, strict=True)]))
