"""Between the values of a group and its coefficients: the profile's matrices, folded for use.

::

    encode   c = (x - mu - p·M) E      E = A U            p: the tokens' rows of the prediction table, M: its map to values
    decode   x = mu + p·M + c D        D = Uᵀ A⁻¹         only the rows of coefficients that are active

Legend: N tokens of all blocks, C columns of a group, R coefficients, S sketch rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np
import torch

from kvstore.block import Distortion
from kvstore.errors import InvalidInputError
from kvstore.layout import RATIO_BYTES_PER_VALUE, KVLayout

from ..entropy.book import TOTAL, Book
from ..profile import Profile
from .groups import Group
from .models import ACTIVE, CLASS_STEPS, CLASSES, OCTAVE, Models

#: Random directions in which the error of a block's K, and of its V, is measured: relative accuracy ~ sqrt(2 / (S · tokens · groups)).
SKETCH = 64
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
            self.usual_steps = _usual_steps(self.kappa, self.shape, book)
            # What RoPE multiplies the length of each channel of a key by.
            self._key_scale = torch.ones(layout.head_dim)
            self._key_scale[: layout.rope.rotary_dim] = layout.rope.scale
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
        inverse, dtype = torch.linalg.inv(self.weight), product_dtype(self.device.type)
        return [(u.double().T @ self._block(g, inverse)).to(self.device, dtype) for g, u in zip(self.groups, self.basis, strict=True)]

    @cached_property
    def maps(self) -> list[torch.Tensor]:
        """M of each group, float32 [rank, C]."""
        return [self.map[:, g.columns].float().to(self.device) for g in self.groups]

    @cached_property
    def sketches(self) -> list[torch.Tensor]:
        """D times random signs over K, then over V: float32 [R, 2·S] on the CPU, scaled to keep squared norms."""
        out = []
        for i, d in enumerate(self.decoders):
            half = d.shape[1] // 2
            d = d.float().cpu()
            keys = d[:, :half] * self._key_scale.repeat(half // len(self._key_scale))
            generator = torch.Generator().manual_seed(i)
            signs = [torch.randint(0, 2, (half, SKETCH), generator=generator).float() * 2 - 1 for _ in range(2)]
            out.append(torch.cat([keys @ signs[0], d[:, half:] @ signs[1]], 1) / SKETCH**0.5)
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

    def distortion(self, errors: list[np.ndarray], energy: Sequence[float]) -> Distortion:
        """Relative squared error of a block's K and V, from the errors of its coefficients ([R, T] of each group).

        Measured along `SKETCH` random directions of each group, which costs a ninth of decoding; below a per cent off for 64 tokens.
        """
        total = np.zeros(2)
        for e, sketch in zip(errors, self.sketches, strict=True):
            seen = torch.from_numpy(e).T @ sketch
            total += [float(half.square().sum()) for half in seen.split(SKETCH, 1)]
        return Distortion(*(min(float(t / s), _LARGEST) if s > 0 else float(t > 0) for t, s in zip(total, energy, strict=True)))

    def expected_divergence(self, errors: list[np.ndarray]) -> float:
        """The profile's estimate for a prefix of blocks like this one, nats a continued token."""
        count = sum(e.size for e in errors)
        return self.divergence * sum(float(np.vdot(e, e)) for e in errors) / max(count, 1)

    def guess(self, ratio: float) -> int:
        """Step index at which a block usually meets `ratio`, for the search to start from."""
        ratios, steps = self.usual_steps
        return round(np.interp(-np.log2(ratio), -ratios, steps))

    def values(self, group: int, c_RN: torch.Tensor, rows_NR: torch.Tensor | None) -> torch.Tensor:
        """Values of a group from its first R coefficients: float32 [N, C]."""
        x = self.base(group, rows_NR, c_RN.shape[1])
        d = self.decoders[group][: len(c_RN)]
        return x.addmm_(c_RN.T, d) if d.dtype == x.dtype else x.add_(c_RN.T.to(d.dtype) @ d)


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
