"""The shape of a model's KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .block import RATIO_BYTES_PER_VALUE
from .errors import InvalidInputError
from .rope import NO_ROPE, LayeredRope, RopeSpec, rope_from_config

#: Element types that a block may hold, by their name on the wire; the number never changes meaning.
DTYPES: dict[str, tuple[int, torch.dtype]] = {
    "float16": (1, torch.float16),
    "bfloat16": (2, torch.bfloat16),
    "float32": (3, torch.float32),
}


def dtype_name(dtype: torch.dtype) -> str:
    """Name of `dtype` as in `DTYPES`. Raises InvalidInputError for any other."""
    for name, (_, candidate) in DTYPES.items():
        if candidate == dtype:
            return name
    raise InvalidInputError(f"dtype {dtype} is not supported; use one of {', '.join(DTYPES)}")


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape, element type and rotation of one model's KV cache.

    Parameters
    ----------
    layers, kv_heads, head_dim : int
        1–1,024 layers, 1–4,096 heads, head dim 1–1,024.
    dtype : torch.dtype
        Element type of the live cache: float16, bfloat16 or float32.
    rope : RopeSpec or LayeredRope
        Rotation of the keys, one for all layers or one for each.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    rope: RopeSpec | LayeredRope = NO_ROPE

    def __post_init__(self) -> None:
        for name, low, high in (("layers", 1, 1024), ("kv_heads", 1, 4096), ("head_dim", 1, 1024)):
            value = getattr(self, name)
            if not isinstance(value, int) or not low <= value <= high:
                raise InvalidInputError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
        dtype_name(self.dtype)
        if isinstance(self.rope, LayeredRope) and len(self.rope.specs) != self.layers:
            raise InvalidInputError(f"{len(self.rope.specs)} rotations for {self.layers} layers")
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
        if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
            kv_heads = 1  # Falcon's word for it
        return cls(layers, kv_heads, head_dim, dtype, rope_from_config(config, head_dim, layers))
