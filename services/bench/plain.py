"""`transformers`' own generate, as anybody would call it: the yardstick of `bench serving`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


class Plain:
    """The model at `path` in `dtype` on `device`, with the attention that `transformers` picks by itself."""

    def __init__(self, path: Path, dtype: torch.dtype, device: str = "cpu") -> None:
        self._model, self._device = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval(), device
        self.attention = self._model.config._attn_implementation

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> float:
        """Seconds for `new` greedy tokens after each prompt, all prompts of one length in one batch."""
        began = time.perf_counter()
        ids = torch.tensor([list(p) for p in prompts], device=self._device)
        out = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
        out.cpu()  # a GPU has answered once its tokens are here
        return time.perf_counter() - began

    def prefill(self, prompt: Sequence[int]) -> float:
        """Seconds until the first token after `prompt`."""
        return self.generate([prompt], 1)

    def measure(self, prompts: Sequence[Sequence[int]], new: int) -> dict[str, float]:
        """The same keys as our engine's. Decode is what is left of the time without that of the first token."""
        first, whole = self.generate(prompts, 1), self.generate(prompts, new)
        return {
            "tokens_per_s": len(prompts) * new / whole,
            "decode_tokens_per_s": len(prompts) * (new - 1) / (whole - first),
            "latency_s": whole,
            "latency_p95_s": whole,
            "ttft_s": first,
        }
