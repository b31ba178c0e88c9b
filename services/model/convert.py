"""From a quantized GGUF file to a Hugging Face directory with dense bf16 weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def gguf_to_safetensors(gguf: Path, target: Path) -> None:
    """Write the model and the tokenizer of the file `gguf` to the new directory `target`.

    `transformers` dequantizes while it reads. Its ``save_pretrained`` refuses a model that came from GGUF, so the parts are saved
    one by one; the config loses the note of a quantization that is no more.

    Raises
    ------
    ValueError
        When a weight was left quantized.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = model.config
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    weights = model.state_dict()
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)  # shares the embedding's memory, which the format does not allow
    packed = sorted(name for name, weight in weights.items() if weight.dtype != torch.float32)
    if packed:
        raise ValueError(f"{gguf.name}: {packed[0]} and {len(packed) - 1} more weights are still quantized; use the pinned transformers")

    target.mkdir(parents=True)
    dense = {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    save_file(dense, target / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    tokenizer.save_pretrained(target)
