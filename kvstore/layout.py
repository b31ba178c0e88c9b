"""The shape of a model's KV cache, and its rotary embedding.

Shape suffixes: L layer, H KV head, T token, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from .errors import InvalidInputError

#: Element types that a block may hold, by their name on the wire; the number never changes meaning.
DTYPES: dict[str, tuple[int, torch.dtype]] = {
    "float16": (1, torch.float16),
    "bfloat16": (2, torch.bfloat16),
    "float32": (3, torch.float32),
}
#: Bytes of one value in every ratio that Concertina reports, whatever the dtype (DESIGN §5).
RATIO_BYTES_PER_VALUE = 2


def dtype_name(dtype: torch.dtype) -> str:
    """Name of `dtype` as in `DTYPES`. Raises InvalidInputError for any other."""
    for name, (_, candidate) in DTYPES.items():
        if candidate == dtype:
            return name
    raise InvalidInputError(f"dtype {dtype} is not supported; use one of {', '.join(DTYPES)}")


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
        inv_freq = torch.tensor(self.inv_freq, dtype=torch.float32, device=keys.device)
        angle = positions.to(keys.device, torch.float32)[..., None] * inv_freq
        cos, sin = angle.cos() * self.scale, angle.sin() * self.scale
        if inverse:
            cos, sin = cos / self.scale**2, -sin / self.scale**2
        out = keys.float().clone()
        half = len(self.inv_freq)
        if self.interleaved:
            a, b = keys[..., 0 : 2 * half : 2].float(), keys[..., 1 : 2 * half : 2].float()
            out[..., 0 : 2 * half : 2], out[..., 1 : 2 * half : 2] = a * cos - b * sin, b * cos + a * sin
        else:
            a, b = keys[..., :half].float(), keys[..., half : 2 * half].float()
            out[..., :half], out[..., half : 2 * half] = a * cos - b * sin, b * cos + a * sin
        return out.to(keys.dtype)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape, element type and rotation of one model's KV cache.

    Parameters
    ----------
    layers, kv_heads, head_dim : int
        1–128 layers, at least one head, head dim 1–1024.
    dtype : torch.dtype
        Element type of the live cache: float16, bfloat16 or float32.
    rope : RopeSpec
        Rotation of the keys.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    rope: RopeSpec = RopeSpec()

    def __post_init__(self) -> None:
        for name, low, high in (("layers", 1, 1024), ("kv_heads", 1, 4096), ("head_dim", 1, 1024)):
            value = getattr(self, name)
            if not isinstance(value, int) or not low <= value <= high:
                raise InvalidInputError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
        dtype_name(self.dtype)
        if self.rope.rotary_dim > self.head_dim:
            raise InvalidInputError(f"RoPE rotates {self.rope.rotary_dim} channels, more than head_dim {self.head_dim}")

    @property
    def values_per_token(self) -> int:
        """Numbers in one token's K and V over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in the live cache."""
        return self.values_per_token * self.dtype.itemsize

    def raw_bytes(self, tokens: int) -> int:
        """The numerator of every ratio: K and V of `tokens` at 2 bytes a value."""
        return self.values_per_token * tokens * RATIO_BYTES_PER_VALUE

    @classmethod
    def from_model_config(cls, config: Any, dtype: torch.dtype = torch.bfloat16) -> KVLayout:
        """Layout of a Hugging Face `PretrainedConfig` (read by attribute; `transformers` is not imported).

        Raises
        ------
        InvalidInputError
            For models whose cache is not one K and one V per layer and head (MLA, state space), by name.
        """
        config = getattr(config, "text_config", None) or config
        if getattr(config, "kv_lora_rank", None):
            raise InvalidInputError(f"{config.model_type}: multi-head latent attention has no per-head K and V to store")
        heads = getattr(config, "num_attention_heads", None)
        layers = getattr(config, "num_hidden_layers", None)
        hidden = getattr(config, "hidden_size", None)
        if not heads or not layers or not hidden:
            raise InvalidInputError("the model's config names no num_hidden_layers, num_attention_heads or hidden_size")
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(layers, kv_heads, head_dim, dtype, rope_from_config(config, head_dim))


def rope_from_config(config: Any, head_dim: int) -> RopeSpec:
    """Rotation named by a Hugging Face config: default, linear, Llama 3 and YaRN scaling, partial rotary factor.

    Raises
    ------
    InvalidInputError
        For scalings that depend on the sequence length (dynamic, LongRoPE) or that differ by layer.
    """
    parameters = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    theta = parameters.get("rope_theta") or getattr(config, "rope_theta", None)
    if theta is None:
        return RopeSpec()
    partial = parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or getattr(config, "rotary_pct", None)
    dim = int(head_dim * (partial or 1.0)) // 2 * 2
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
    return RopeSpec(tuple(inv_freq), scale)


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


def _yarn(inv_freq: list[float], dim: int, theta: float, factor: float, parameters: dict[str, Any], original: int) -> tuple[list[float], float]:
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
