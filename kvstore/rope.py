"""Rotary position embedding (RoFormer, arXiv 2104.09864) as models apply it to keys, and its inverse.

Shape suffixes: L layer, H KV head, T token, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from .errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding as the model applies it to keys.

    Parameters
    ----------
    inv_freq : tuple of float
        Angular frequency of each rotated pair, after any scaling (Llama 3, YaRN, linear); empty when the model has no RoPE.
    scale : float
        Factor on cos and sin (YaRN's attention scaling), 1.0 for most.
    interleaved : bool
        Pairs are (2i, 2i+1) instead of (i, i + rotary_dim/2).

    `rotary_dim` = ``2 * len(inv_freq)`` leading channels are rotated, the rest pass through (partial RoPE).
    """

    inv_freq: tuple[float, ...] = ()
    scale: float = 1.0
    interleaved: bool = False

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.inv_freq)

    def canonical(self) -> str:
        """Text that two equal rotations share, for the namespace."""
        return ",".join(f"{f:.9e}" for f in self.inv_freq) + f";{self.scale:.9e};{int(self.interleaved)}"

    def for_layer(self, layer: int) -> RopeSpec:
        """The rotation of one layer: here, the same for all."""
        return self

    def for_layers(self, first: int, last: int) -> RopeSpec:
        """That of a range of layers."""
        return self

    def tables(self, positions: torch.Tensor, *, inverse: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, scaled, by which each pair (a, b) becomes (a·cos - b·sin, b·cos + a·sin): float32 [*positions, pairs]."""
        inv_freq = torch.tensor(self.inv_freq, dtype=torch.float32, device=positions.device)
        angle = positions.to(torch.float32)[..., None] * inv_freq
        cos, sin = angle.cos() * self.scale, angle.sin() * self.scale
        return (cos / self.scale**2, -sin / self.scale**2) if inverse else (cos, sin)

    def rotate(self, keys: torch.Tensor, positions: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
        """Apply (or with `inverse` remove) the rotation.

        Parameters
        ----------
        keys : Tensor [..., T, D]
        positions : Tensor [T] or broadcastable to ``keys.shape[:-1]``
            Absolute positions.

        Returns
        -------
        Tensor like `keys`, computed in float32.
        """
        if not self.inv_freq:
            return keys
        cos, sin = self.tables(positions.to(keys.device), inverse=inverse)
        out = keys.float().clone()
        half = len(self.inv_freq)
        if self.interleaved:
            a, b = keys[..., 0 : 2 * half : 2].float(), keys[..., 1 : 2 * half : 2].float()
            out[..., 0 : 2 * half : 2], out[..., 1 : 2 * half : 2] = a * cos - b * sin, b * cos + a * sin
        else:
            a, b = keys[..., :half].float(), keys[..., half : 2 * half].float()
            out[..., :half], out[..., half : 2 * half] = a * cos - b * sin, b * cos + a * sin
        return out.to(keys.dtype)


#: Models without rotary embedding.
NO_ROPE = RopeSpec()
#: Types of models that rotate neighbouring channels; their configs do not say so. Taken for one that does not, a model's keys would still
#: come back as they were, only less well compressed.
INTERLEAVED = {
    "codegen", "cohere", "cohere2", "cohere2_moe", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "gptj", "helium", "llama4_text",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LayeredRope:
    """One `RopeSpec` for each layer, for models that mix them (Gemma 3's local and global layers).

    Same interface as `RopeSpec`; `rotate` wants the layer axis, ``keys [..., L, H, T, D]``.
    """

    specs: tuple[RopeSpec, ...]

    @property
    def rotary_dim(self) -> int:
        return max(spec.rotary_dim for spec in self.specs)

    def canonical(self) -> str:
        return "|".join(spec.canonical() for spec in self.specs)

    def for_layer(self, layer: int) -> RopeSpec:
        return self.specs[layer]

    def for_layers(self, first: int, last: int) -> LayeredRope:
        return LayeredRope(self.specs[first:last])

    def rotate(self, keys: torch.Tensor, positions: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
        if keys.shape[-4] != len(self.specs):
            raise InvalidInputError(f"keys of all {len(self.specs)} layers are needed, not {keys.shape[-4]}; use for_layer")
        if positions.ndim >= 3:  # they have a layer axis too
            places = positions.expand(*positions.shape[:-3], len(self.specs), *positions.shape[-2:]).unbind(-3)
        else:
            places = [positions] * len(self.specs)
        each = zip(self.specs, keys.unbind(-4), places, strict=True)
        return torch.stack([spec.rotate(k, at, inverse=inverse) for spec, k, at in each], dim=-4)


def rope_from_config(config: Any, head_dim: int, layers: int) -> RopeSpec | LayeredRope:
    """Rotation named by a Hugging Face config: default, linear, Llama 3 and YaRN scaling, partial, by layer type or in some layers only.

    Raises
    ------
    InvalidInputError
        For scalings that depend on the sequence length (dynamic, LongRoPE).
    """
    parameters = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    types = getattr(config, "layer_types", None)
    if types and parameters and set(types) <= set(parameters):
        return LayeredRope(tuple(_from_parameters(config, dict(parameters[types[i]] or {}), head_dim) for i in range(layers)))
    spec, rotated = _from_parameters(config, parameters, head_dim), getattr(config, "no_rope_layers", None)
    if rotated and not all(rotated[:layers]):  # in spite of the name, 1 stands for a layer with rotation
        return LayeredRope(tuple(spec if yes else NO_ROPE for yes in rotated[:layers]))
    return spec


def _from_parameters(config: Any, parameters: dict[str, Any], head_dim: int) -> RopeSpec:
    theta = parameters.get("rope_theta") or getattr(config, "rope_theta", None)
    rotary_dim = getattr(config, "rotary_dim", None)  # of GPT-J and CodeGen, which have no other parameters
    if theta is None and rotary_dim is None:
        return NO_ROPE
    theta = theta or 10_000.0
    partial = parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
    partial = partial or getattr(config, "rotary_pct", None)
    dim = min(rotary_dim or int(head_dim * (partial or 1.0)), head_dim) // 2 * 2
    inv_freq = [float(theta) ** (-2.0 * i / dim) for i in range(dim // 2)]
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    scale, factor = 1.0, float(parameters.get("factor") or 1.0)
    original = parameters.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", 0)
    if kind == "linear":
        inv_freq = [f / factor for f in inv_freq]
    elif kind == "llama3":
        inv_freq = [_llama3(f, factor, parameters, original) for f in inv_freq]
    elif kind == "yarn":
        inv_freq, scale = _yarn(inv_freq, dim, float(theta), factor, parameters, original)
    elif kind not in ("default", "mrope"):
        raise InvalidInputError(f"RoPE type {kind!r} is not supported; known: default, linear, llama3, yarn")
    return RopeSpec(tuple(inv_freq), scale, getattr(config, "model_type", None) in INTERLEAVED)


def _llama3(freq: float, factor: float, parameters: dict[str, Any], original: int) -> float:
    """Llama 3.1's frequency-dependent scaling (transformers, `rope_type="llama3"`)."""
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    wavelength = 2 * math.pi / freq
    if wavelength < original / high:
        return freq
    if wavelength > original / low:
        return freq / factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * freq / factor + smooth * freq


def _yarn(
    inv_freq: list[float], dim: int, theta: float, factor: float, parameters: dict[str, Any], original: int
) -> tuple[list[float], float]:
    """YaRN (arXiv 2309.00071): interpolate slow pairs, keep fast ones, scale attention."""
    fast, slow = float(parameters.get("beta_fast") or 32), float(parameters.get("beta_slow") or 1)

    def dim_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_of(fast), dim_of(slow)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = max(high - low, 0.001)
    keep = [1 - min(max((i - low) / span, 0.0), 1.0) for i in range(dim // 2)]
    scaled = [f / factor * (1 - k) + f * k for f, k in zip(inv_freq, keep, strict=True)]
    attention = parameters.get("attention_factor")
    if attention is None:
        mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")

        def magnitude(m: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

        attention = magnitude(mscale) / magnitude(all_dim) if mscale and all_dim else magnitude(1.0)
    return scaled, float(attention)
