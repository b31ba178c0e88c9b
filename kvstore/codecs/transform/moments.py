"""What calibration accumulates over the samples, in one pass: means, second moments, Fisher information.

Shape suffixes: L layer, H KV head, T token, D head dim, N rows (tokens), C columns of a group, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvstore.errors import InvalidInputError, LayoutMismatchError
from kvstore.layout import KVLayout
from kvstore.rope import LayeredRope, RopeSpec

from ..base import KVSample, is_finite
from .classes import log_sizes
from .groups import Group, gather

#: Positions before this one are attention sinks, whose norms and gradients are nothing like the rest's (FIELD: a thousand times).
FIRST_TOKEN = 4


def unrotate(rope: RopeSpec | LayeredRope, k_BLHTD: torch.Tensor, positions_BT: torch.Tensor, *, inverse: bool = True) -> torch.Tensor:
    """Keys of the layers of `rope` as they were before it (or, with ``inverse=False``, after it), float32."""
    return rope.rotate(k_BLHTD.float(), positions_BT[:, None, None, :], inverse=inverse)


def rows_of(layout: KVLayout, sample: KVSample, groups: Sequence[Group]) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of a sample's ordinary tokens, float32 [N, all columns], keys unrotated, and their token ids [N]."""
    check(layout, sample)
    positions = sample.start + torch.arange(sample.keys.shape[2])
    keys = unrotate(layout.rope, sample.keys[None], positions[None])
    x = torch.cat([gather(keys[:, g.first : g.last], sample.values[None, g.first : g.last]) for g in groups], 1)
    ordinary = positions >= FIRST_TOKEN
    return x[ordinary], torch.as_tensor(sample.tokens).cpu()[ordinary]


def check(layout: KVLayout, sample: KVSample) -> None:
    """Raise LayoutMismatchError for a sample of another layout, InvalidInputError for one with NaN or Inf."""
    shape = tuple(sample.keys.shape)
    if len(shape) != 4 or (shape[0], shape[1], shape[3]) != (layout.layers, layout.kv_heads, layout.head_dim):
        raise LayoutMismatchError(f"a sample's keys {shape} do not fit [{layout.layers}, {layout.kv_heads}, tokens, {layout.head_dim}]")
    if sample.values.shape != sample.keys.shape or len(sample.tokens) != shape[2]:
        raise LayoutMismatchError("a sample's keys, values and tokens differ in shape")
    for what in ("keys", "values", "key_grads", "value_grads"):
        x = getattr(sample, what)
        if x is not None and x.numel() and not is_finite(x):
            raise InvalidInputError(f"a sample's {what} hold NaN or Inf; run the model in float32")


class Moments:
    """Sums over samples. Values are taken relative to the first sample's mean, so that float32 sums keep their digits.

    Parameters
    ----------
    layout : KVLayout
    groups : sequence of Group
    features : int
        Length of the feature vector of a token, 0 for no prediction.
    """

    def __init__(self, layout: KVLayout, groups: Sequence[Group], features: int) -> None:
        columns = layout.values_per_token
        self.layout, self.groups = layout, groups
        self.count = 0
        self.origin: torch.Tensor | None = None
        self.sum_C = torch.zeros(columns)
        self.second = [torch.zeros(g.width, g.width) for g in groups]
        self.features_FF = torch.zeros(features, features)
        self.cross_FC = torch.zeros(features, columns)
        self.fisher = torch.zeros(layout.layers, 2, layout.kv_heads, layout.head_dim, layout.head_dim)
        self.fisher_count = 0
        #: Of each sample with gradients, for its ordinary tokens: `classes.log_sizes`, and the mean square of each head's gradients.
        self.sizes_LKHT: list[torch.Tensor] = []
        self.pulls_LKHT: list[torch.Tensor] = []

    def add(self, sample: KVSample, x_NC: torch.Tensor, features_NF: torch.Tensor | None) -> None:
        """Take in one sample, its `rows_of` and their features."""
        if self.origin is None:
            self.origin = x_NC.mean(0)
        x = x_NC - self.origin
        self.count += len(x)
        self.sum_C += x.sum(0)
        for group, total in zip(self.groups, self.second, strict=True):
            total.addmm_(x[:, group.columns].T, x[:, group.columns])
        if features_NF is not None:
            self.features_FF.addmm_(features_NF.T, features_NF)
            self.cross_FC.addmm_(features_NF.T, x)
        if sample.key_grads is not None and sample.value_grads is not None and (sample.key_grads.any() or sample.value_grads.any()):
            self._add_fisher(sample)

    def _add_fisher(self, sample: KVSample) -> None:
        # Gradients may cover the first tokens only: those after are the continuation whose likelihood was differentiated.
        positions = sample.start + torch.arange(sample.key_grads.shape[2])
        # The keys are s·R·k: the gradient with respect to k is s·Rᵀ·g, s² times what undoing the rotation gives.
        keys = unrotate(self.layout.rope, sample.key_grads[None], positions[None])[0]
        for layer, k_HTD in enumerate(keys):
            spec = self.layout.rope.for_layer(layer)
            k_HTD[..., : spec.rotary_dim] *= spec.scale**2
        ordinary = positions >= FIRST_TOKEN
        for i, g_LHTD in enumerate((keys, sample.value_grads.float())):
            g = g_LHTD[:, :, ordinary]
            self.fisher[:, i] += g.transpose(-1, -2) @ g
        self.fisher_count += int(ordinary.sum())
        mine = [x[:, :, : len(positions)][None, :, :, ordinary] for x in (sample.keys, sample.values)]
        self.sizes_LKHT.append(log_sizes(*mine)[0].float())
        self.pulls_LKHT.append(torch.stack([g[:, :, ordinary].float().square().mean(-1) for g in (keys, sample.value_grads)], 1))

    @property
    def mean_C(self) -> torch.Tensor:
        """Mean of all values."""
        return self.origin + self.sum_C / self.count

    def plus(self, other: Moments) -> Moments:
        """Moments of both, which must share an origin."""
        out = Moments.__new__(Moments)
        out.layout, out.groups, out.origin = self.layout, self.groups, self.origin
        out.second = [a + b for a, b in zip(self.second, other.second, strict=True)]
        for name in ("count", "sum_C", "features_FF", "cross_FC", "fisher", "fisher_count", "sizes_LKHT", "pulls_LKHT"):
            setattr(out, name, getattr(self, name) + getattr(other, name))
        return out
