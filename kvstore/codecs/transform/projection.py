"""Between the values of a group and its coefficients: the profile's matrices, folded for use.

::

    encode   c = (x - mu - p·M) E      E = A U            p: the tokens' rows of the prediction table, M: its map to values
    decode   x = mu + p·M + c D        D = Uᵀ A⁻¹         only the rows of coefficients that are active

Legend: N tokens of all blocks, C columns of a group, R coefficients, S random directions.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from kvstore.block import Distortion
from kvstore.errors import ConfigError, InvalidInputError
from kvstore.layout import RATIO_BYTES_PER_VALUE, KVLayout

from ..entropy.book import TOTAL, Book
from ..profile import Profile
from . import fit
from .groups import Group
from .models import ACTIVE, CLASS_STEPS, CLASSES, OCTAVE, Models

#: Random directions, over all groups, in which the error of a block's K, and of its V, is measured: relative accuracy
#: sqrt(2 / (directions · tokens)), a per cent for 64 tokens.
DIRECTIONS = 256
#: Directions of one group at least.
_FEWEST = 32
#: What float32 can hold of a relative error whose denominator vanishes.
_LARGEST = 3e38
_READY: weakref.WeakKeyDictionary[Profile, dict[torch.device, Projection]] = weakref.WeakKeyDictionary()


class Projection:
    """A profile ready for use. Immutable but for matrices folded on first use; shared by codecs of one profile.

    Raises
    ------
    InvalidInputError
        If the profile's tensors do not fit together.
    """

    def __init__(self, profile: Profile, layout: KVLayout, device: torch.device) -> None:
        profile.check(layout)
        self.device = device
        t = profile.tensors
        try:
            self.groups = _groups(profile.facts["groups"], layout)
            self.mean = t["mean"].float().to(device)
            self.weight = t["weight"].double()
            self.basis = [t[f"basis.{i}"] for i in range(len(self.groups))]
            self.kappa = [np.ascontiguousarray(t["kappa"].numpy()[g.columns], dtype=np.int32) for g in self.groups]
            self.shape = [np.ascontiguousarray(t["shape"].numpy()[g.columns], dtype=np.int32) for g in self.groups]
            book = Book(t["models.freq"].numpy().astype(np.uint16), *(t[f"models.{n}"].numpy() for n in ("first", "shift", "escape")))
            self.models = Models(book, t["models.zero"].numpy().astype(np.uint16), t["models.centre"].numpy())
            self.divergence = float(profile.facts["divergence"])
            # What the sizes of a token's K and V say about the harm of an error in them; None: all tokens alike.
            self.harm = t["harm"].double() if "harm" in t else None
            self.usual_steps = _usual_steps(self.kappa, self.shape, book)
            # What RoPE multiplies the length of each channel of a key by.
            self._key_scale = torch.ones(layout.layers, layout.head_dim)
            for layer, scale in enumerate(self._key_scale):
                scale[: layout.rope.for_layer(layer).rotary_dim] = layout.rope.for_layer(layer).scale
        except (KeyError, TypeError) as error:
            raise InvalidInputError(f"the profile lacks {error}; calibrate again") from error
        table = t.get("predict.table")
        self.table, self.map = None if table is None else table.to(device), t.get("predict.map")
        if [b.shape for b in self.basis] != [(g.width, g.width) for g in self.groups]:
            raise InvalidInputError("the profile's basis does not fit its groups; calibrate again")

    @classmethod
    def of(cls, profile: Profile, layout: KVLayout, device: torch.device | str = "cpu") -> Projection:
        """The projection of `profile` on `device`, made once for each profile object."""
        profile.check(layout)
        device = torch.device(device)
        ready = _READY.setdefault(profile, {})
        if device not in ready:
            ready[device] = cls(profile, layout, device)
        return ready[device]

    @property
    def predicts(self) -> bool:
        """Whether token ids are needed."""
        return self.table is not None

    @cached_property
    def encoders(self) -> list[torch.Tensor]:
        """E of each group, float32 [C, R]."""
        return [(self._block(g, self.weight) @ u.double()).float().to(self.device) for g, u in zip(self.groups, self.basis, strict=True)]

    @cached_property
    def decoders(self) -> list[torch.Tensor]:
        """D of each group, [R, C] in the type of `product_dtype`."""
        inverse, dtype = fit.inverse(self.weight), product_dtype(self.device.type)
        return [(u.double().T @ self._block(g, inverse)).to(self.device, dtype) for g, u in zip(self.groups, self.basis, strict=True)]

    @cached_property
    def maps(self) -> list[torch.Tensor]:
        """M of each group, float32 [rank, C]."""
        return [self.map[:, g.columns].float().to(self.device) for g in self.groups]

    @cached_property
    def decoder_elements(self) -> list[np.ndarray]:
        """`decoders` as numba's loops read them; on the CPU."""
        from ..floats import view_of

        return [view_of(d) for d in self.decoders]

    @cached_property
    def decoder(self) -> Any:
        """What decodes on this device where that is not the CPU: `triton_decoder.TritonDecoder`.

        Raises
        ------
        ConfigError
            Without Triton.
        """
        try:
            from .triton_decoder import TritonDecoder
        except ImportError as error:
            raise ConfigError("decoding `transform` blocks on an accelerator needs Triton; install it (pip install triton)") from error
        return TritonDecoder(self)

    @cached_property
    def directions(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Random signs over the K of a group, then over its V, float32 [C / 2, S] each on the CPU, scaled to keep squared norms.

        Keys count as long as RoPE makes them.
        """
        out, count = [], max(DIRECTIONS // len(self.groups), _FEWEST)
        for i, group in enumerate(self.groups):
            half, generator = group.width // 2, torch.Generator().manual_seed(i)
            keys, values = ((torch.randint(0, 2, (half, count), generator=generator).float() * 2 - 1) / count**0.5 for _ in range(2))
            scale = self._key_scale[group.first : group.last, None]
            out.append((keys * scale.expand(-1, half // scale.numel(), -1).reshape(half, 1), values))
        return out

    @cached_property
    def sketches(self) -> list[np.ndarray]:
        """D in those directions: float32 [R, 2·S]."""
        out = []
        for d, halves in zip(self.decoders, self.directions, strict=True):
            parts = zip(d.float().cpu().split(d.shape[1] // 2, 1), halves, strict=True)
            out.append(torch.cat([part @ signs for part, signs in parts], 1).numpy())
        return out

    @staticmethod
    def _block(group: Group, blocks: torch.Tensor) -> torch.Tensor:
        return torch.block_diag(*blocks[group.first : group.last].transpose(0, 1).flatten(0, 2))

    def rows(self, tokens_BT: torch.Tensor | None) -> torch.Tensor | None:
        """p of each token, float32 [N, rank]; None where nothing is predicted.

        Raises
        ------
        InvalidInputError
            For an id outside the model's vocabulary.
        """
        if self.table is None or tokens_BT is None:
            return None
        ids = tokens_BT.reshape(-1).cpu()
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= len(self.table)):
            raise InvalidInputError(f"token ids must be from 0 to {len(self.table) - 1}, the vocabulary of the profile")
        return self.table[ids.to(self.device)].float()

    def base(self, group: int, rows_NR: torch.Tensor | None, count: int) -> torch.Tensor:
        """mu + p·M, what is known without the block: float32 [N, C]."""
        mean = self.mean[self.groups[group].columns]
        return mean.expand(count, -1).clone() if rows_NR is None else torch.addmm(mean, rows_NR, self.maps[group])

    @staticmethod
    def distortion(lost_NS: Sequence[np.ndarray], energy: Sequence[float]) -> Distortion:
        """Relative squared error of a block's K and V, from the error of each group in the random directions, float32 [T, 2·S].

        That costs a fraction of decoding.
        """
        total = sum(np.square(z.reshape(len(z), 2, z.shape[1] // 2), dtype=np.float64).sum((0, 2)) for z in lost_NS)
        return Distortion(*(min(float(t / s), _LARGEST) if s > 0 else float(t > 0) for t, s in zip(total, energy, strict=True)))

    def expected_divergence(self, lost: float, count: int) -> float:
        """The profile's estimate for a prefix of blocks like this one, nats a continued token.

        Parameters
        ----------
        lost : float
            Sum of squared errors of the block's `count` coefficients, as `BlockEncoder.lost` counts them.
        """
        second_order = self.divergence * lost / max(count, 1)
        return fit.AGREES_AT * (second_order / fit.AGREES_AT) ** fit.GROWTH

    def guess(self, ratio: float) -> int:
        """Step index at which a block usually meets `ratio`, for the search to start from."""
        ratios, steps = self.usual_steps
        return round(np.interp(-np.log2(ratio), -ratios, steps))

    def add_common(self, group: int, c_RN: torch.Tensor, rows_NC: torch.Tensor) -> torch.Tensor:
        """Add what the group's first R coefficients stand for to `rows_NC`, float32, which is also what is returned."""
        d = self.decoders[group][: len(c_RN)]
        return rows_NC.addmm_(c_RN.T, d) if d.dtype == rows_NC.dtype else rows_NC.add_(c_RN.T.to(d.dtype) @ d)


@lru_cache(maxsize=4)
def product_dtype(device_type: str) -> torch.dtype:
    """bfloat16 where it is multiplied natively: it adds 0.3 % to the squared error at 8 times, less above. Else float32."""
    if device_type != "cpu":
        return torch.bfloat16
    native = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.bfloat16 if any(test is not None and test() for test in native) else torch.float32


def _groups(layers: list[int], layout: KVLayout) -> tuple[Group, ...]:
    if sum(layers) != layout.layers or min(layers) < 1:
        raise InvalidInputError(f"the profile's groups {layers} do not cover {layout.layers} layers")
    width, out, first = 2 * layout.kv_heads * layout.head_dim, [], 0
    for n in layers:
        out.append(Group(first, first + n, slice(first * width, (first + n) * width)))
        first += n
    return tuple(out)


def _usual_steps(kappa: Sequence[np.ndarray], shape: Sequence[np.ndarray], book: Book) -> tuple[np.ndarray, np.ndarray]:
    """log2 of ratios, falling, and the step index of each, if coefficients are as calibration found them."""
    p = book.freq / TOTAL
    entropy = np.where(p > 0, p * np.where(p > 0, book.cost, 0), 0).sum(1)
    k, s = np.concatenate(kappa).astype(np.int64), np.concatenate(shape)
    steps = np.arange(int(k.max()) + OCTAVE, int(np.median(k)) - 8 * OCTAVE, -4)
    bits = []
    for m in steps:
        above = k - m - ACTIVE
        table = s * CLASSES + np.minimum(above // CLASS_STEPS, CLASSES - 1)
        bits.append(entropy[table[above >= 0]].sum())
    ratio = np.log2(8 * RATIO_BYTES_PER_VALUE * len(k) / np.maximum(bits, 1e-3))
    return ratio, steps.astype(np.float64)
