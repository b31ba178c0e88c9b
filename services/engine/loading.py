"""Load a causal language model and its tokenizer, or say by name why it cannot be served."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvstore.errors import ConfigError, InvalidInputError
from kvstore.layout import DTYPES, KVLayout

from . import cuda
from .attention import NAME, register
from .config import EngineConfig
from .cpu.gated import use_gated_mlps
from .cpu.norms import use_row_norms
from .cpu.products import use_row_products


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to run."""

    model: torch.nn.Module
    tokenizer: Any
    layout: KVLayout
    context_window: int
    vocab_size: int
    eos: frozenset[int]


def compute_dtype(name: str, native: torch.dtype, device: str) -> torch.dtype:
    """Element type to compute in.

    `auto` is the model's own type, except on CPUs without bfloat16 dot products (AVX512-BF16 or AMX), where 16-bit matrix products
    run at a fifth of the speed of float32: there it is float32, which holds every 16-bit weight exactly.
    """
    if name != "auto":
        return DTYPES[name][1]
    if device.startswith("cuda"):
        return native
    found = torch.cpu.get_capabilities()
    return native if native == torch.bfloat16 and (found.get("avx512_bf16") or found.get("amx_bf16")) else torch.float32


def load(config: EngineConfig) -> Loaded:
    """Load what `config.model` holds.

    Raises
    ------
    ConfigError
        For a directory without a loadable causal language model, a cache that is not one K and one V per layer and head, or
        a device that is not there.
    """
    path = Path(config.model)
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} holds no config.json; give the directory of a Hugging Face model")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for and torch finds no GPU; use device 'cpu'")
    try:
        hf_config = AutoConfig.from_pretrained(path)
        native = getattr(hf_config, "dtype", None) or torch.bfloat16
        dtype = compute_dtype(config.dtype, native, config.device)
        layout = KVLayout.from_model_config(hf_config, dtype=dtype)
        _refuse(hf_config)
        register()
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=NAME).to(config.device).eval()
        use_row_products(model, config.block_tokens)
        use_row_norms(model)
        use_gated_mlps(model)
        if config.device.startswith("cuda") and cuda.has_triton():
            from .cuda.norms import use_row_norms as use_row_norms_on_gpu

            with torch.cuda.device(model.device):
                use_row_norms_on_gpu(model)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except InvalidInputError as error:
        raise ConfigError(f"{path.name} cannot be served: {error}") from error
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} holds no causal language model that transformers can load: {error}") from error
    text = hf_config.get_text_config()
    window = getattr(text, "max_position_embeddings", None) or 2048
    context = min(config.max_context or window, window)
    return Loaded(model.requires_grad_(False), tokenizer, layout, context, model.get_input_embeddings().num_embeddings, _eos(model, text))


def _refuse(hf_config: Any) -> None:
    """Name the kinds of model that would load and then answer wrongly."""
    text = hf_config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise InvalidInputError(f"{text.model_type} has layers of type {', '.join(sorted(kinds))}; known: full and sliding attention")
    if getattr(text, "num_kv_shared_layers", 0):
        raise InvalidInputError(f"{text.model_type} shares K and V between layers")
    if getattr(hf_config, "is_encoder_decoder", False):
        raise InvalidInputError(f"{hf_config.model_type} is an encoder-decoder, not a causal language model")


def _eos(model: Any, text: Any) -> frozenset[int]:
    found = getattr(model.generation_config, "eos_token_id", None)
    found = found if found is not None else getattr(text, "eos_token_id", None)
    return frozenset([found] if isinstance(found, int) else found or ())
