"""K, V and gradients of a causal LM, window by window.

A window's first seven eighths are the prefix, the rest its continuation, as in use: the prefix is computed once and cached, and errors
in the cache harm what comes after. The gradient is that of log p(y) with respect to the cached K and V, with y *sampled* from the model
at every position of the continuation: its second moment is the Fisher information of the cache, and not the "empirical" one of the
text's own tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from kvstore.codecs import KVSample
from kvstore.errors import InvalidInputError

#: Tokens a window, for models whose context is not shorter, and the share of it that is the continuation.
WINDOW = 1024
CONTINUED_SHARE = 8
#: Every so manieth window has gradients: they cost as much again, and heads' sensitivities need fewer texts than a basis does.
GRADIENTS_EVERY = 2


def samples(model: Any, windows: Sequence[Sequence[int]], seed: int = 0) -> Iterator[KVSample]:
    """One `KVSample` a window. Every `GRADIENTS_EVERY`-th has gradients, which cover the prefix only.

    Parameters
    ----------
    model : PreTrainedModel
        A causal LM in float32, in evaluation mode, its parameters without gradients.
    windows : sequence of token ids
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    cache_argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    for number, window in enumerate(windows):
        ids = torch.tensor(window, device=model.device)[None]
        prefix = ids.shape[1] - (continued(ids.shape[1]) if number % GRADIENTS_EVERY == 0 else 0)
        computed = _cache_of([])
        with torch.no_grad():
            model(ids[:, :prefix], use_cache=True, logits_to_keep=1, **{cache_argument: computed})
        if prefix == ids.shape[1]:
            keys, values = (torch.cat([getattr(layer, what) for layer in computed.layers]) for what in ("keys", "values"))
            yield KVSample(keys, values, 0, ids[0].cpu())
            continue
        leaves = [t.detach().requires_grad_() for layer in computed.layers for t in (layer.keys, layer.values)]
        with torch.enable_grad():
            cache = _cache_of(leaves)
            log_p = model(ids[:, prefix:], use_cache=True, **{cache_argument: cache}).logits[0].float().log_softmax(-1)
            sampled = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            grads = torch.autograd.grad(log_p.gather(1, sampled).sum(), leaves)
        yield KVSample(
            torch.cat([layer.keys.detach() for layer in cache.layers]),
            torch.cat([layer.values.detach() for layer in cache.layers]),
            0,
            ids[0].cpu(),
            torch.cat(grads[0::2]),
            torch.cat(grads[1::2]),
        )


def window(config: Any) -> int:
    """Tokens a window of a model with this configuration."""
    return min(WINDOW, getattr(config.get_text_config(), "max_position_embeddings", None) or WINDOW)


def continued(window: int) -> int:
    """How many of a window's tokens are its continuation."""
    return window // CONTINUED_SHARE


def _cache_of(leaves: Sequence[torch.Tensor]) -> Any:
    """A cache that keeps every token, in layers with a sliding window too: keys and values of each layer in turn, none to begin with."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for i in range(len(leaves) // 2):
        cache.update(leaves[2 * i], leaves[2 * i + 1], i)
    return cache


def embeddings(model: Any) -> torch.Tensor:
    """Input embeddings [vocabulary, E]. Raises InvalidInputError for a model without a table of them."""
    table = model.get_input_embeddings()
    if table is None or not hasattr(table, "weight"):
        raise InvalidInputError("the model has no table of input embeddings")
    return table.weight.detach()
