"""A causal LM whose cache can be taken out, changed and put back.

Shape suffixes: L layer, H KV head, T token, D head dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kvstore.codecs import Codec, EncodedBlock
from kvstore.errors import ConfigError
from kvstore.layout import KVLayout

Ids = Sequence[int]
Cache = tuple[torch.Tensor, torch.Tensor]


class CachedModel:
    """A causal LM of `transformers` and its tokenizer; arithmetic and cache in the model's own dtype."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.layout = KVLayout.from_model_config(model.config, model.dtype)
        self._argument = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"

    @classmethod
    def load(cls, model_dir: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> CachedModel:
        """The model in a Hugging Face directory, loaded as `dtype`; it computes, and its caches lie, on `device`."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).to(device)
        return cls(model, AutoTokenizer.from_pretrained(model_dir))

    def ids(self, text: str) -> list[int]:
        """Token ids of `text` as it is."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @torch.inference_mode()
    def run(self, ids: Ids, cache: Cache | None = None, *, logits: bool = True) -> tuple[torch.Tensor, Cache]:
        """Go on from `cache` with `ids`.

        Returns
        -------
        log_probabilities : Tensor [len(ids), vocabulary], float32; of the last position alone without `logits`
        cache : keys and values [L, H, T, D] of everything so far, keys after RoPE
        """
        from transformers import DynamicCache

        live = DynamicCache()
        if cache is not None:
            for layer, (keys_HTD, values_HTD) in enumerate(zip(*cache, strict=True)):
                live.update(keys_HTD[None], values_HTD[None], layer)
        keep = {} if logits else {"logits_to_keep": 1}
        out = self.model(torch.tensor([list(ids)], device=self.model.device), use_cache=True, **{self._argument: live}, **keep)
        keys, values = (torch.stack([getattr(layer, what)[0] for layer in live.layers]) for what in ("keys", "values"))
        return out.logits[0].float().log_softmax(-1), (keys, values)


class Stored(NamedTuple):
    """What the blocks of one cache take, and what their codec expects of them.

    Parameters
    ----------
    size_bytes : int
        Length of all blobs.
    expected_divergence_nats : float
        Mean over tokens; 0 from codecs that make no estimate.
    """

    size_bytes: int
    expected_divergence_nats: float


def through(codec: Codec, cache: Cache, ids: Ids, block_tokens: int, fidelity: int | None = None) -> tuple[Cache, Stored]:
    """What a reader of the store would get: every block encoded, written to bytes, truncated, read and decoded.

    Parameters
    ----------
    fidelity : int, optional
        Truncate each block to it first.

    Returns
    -------
    cache : the same shape
    stored : Stored

    Raises
    ------
    ConfigError
        When the cache does not hold one K and V for each token.
    """
    kept = cache[0].shape[2]
    if kept != len(ids):
        raise ConfigError(f"the model keeps {kept} of {len(ids)} tokens (sliding window?); evaluate with a shorter --prefix")
    tokens, whole = torch.tensor(list(ids)), len(ids) // block_tokens * block_tokens
    stored, expected, parts = 0, 0.0, []
    for first, last in ((0, whole), (whole, len(ids))):  # whole blocks in one batch, and what is left over
        size = min(block_tokens, last - first)
        if not size:
            continue
        ids_BT = tokens[first:last].view(-1, size)
        batch = (x[:, :, first:last].unflatten(2, (-1, size)).permute(2, 0, 1, 3, 4) for x in cache)
        blocks = codec.encode(*batch, start=range(first, last, size), tokens=ids_BT)
        if fidelity is not None:
            blocks = [block.truncate(min(fidelity, block.fidelities[-1])) for block in blocks]
        blobs = [block.to_bytes() for block in blocks]
        stored += sum(map(len, blobs))
        expected += sum(block.expected_divergence for block in blocks) * size / len(ids)
        decoded = codec.decode([EncodedBlock.from_bytes(blob) for blob in blobs], tokens=ids_BT)
        parts.append([x.permute(1, 2, 0, 3, 4).flatten(2, 3) for x in decoded])
    keys, values = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    return (keys, values), Stored(stored, expected)
