"""How far a compressed prefix moves what the model says next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvstore.codecs import Codec
from kvstore.layout import RATIO_BYTES_PER_VALUE

from .model import Cache, CachedModel, through
from .windows import Window

#: The first tokens are attention sinks with norms far from all others; relative errors leave them out.
_SINKS = 4
#: Neighbouring tokens' losses are correlated, so the bootstrap draws runs of them.
_RUN_TOKENS = 32
_DRAWS = 2000


@dataclass(frozen=True)
class Prepared:
    """A window with what the exact cache gives: the reference that every codec is measured against."""

    window: Window
    prefix: int
    cache: Cache
    log_p: torch.Tensor


def prepare(model: CachedModel, windows: Sequence[Window], prefix: int, report: Callable[[int, int], None]) -> list[Prepared]:
    """Prefill each window's prefix and continue it exactly."""
    out = []
    for number, window in enumerate(windows):
        report(number, len(windows))
        _, cache = model.run(window.ids[:prefix], logits=False)
        log_p, _ = model.run(window.ids[prefix:], cache)
        out.append(Prepared(window, prefix, cache, log_p))
    return out


def measure(
    model: CachedModel, codec: Codec, prepared: Sequence[Prepared], block_tokens: int, fidelity: int | None = None
) -> dict[str, Any]:
    """Compress each prefix, continue, and compare.

    Returns
    -------
    dict
        ``ratio`` counts every stored byte against 2 bytes a value; ``kl_*_nats`` is KL(exact ‖ compressed) a token, and
        ``expected_divergence_nats`` what the blocks' headers say of it (null where the codec makes no estimate); the perplexity
        change is a factor with a 95 % bootstrap interval; errors are relative squared errors without the first four tokens.
    """
    raw = stored = 0
    expected: list[float] = []
    kl, agree, losses, errors = [], [], [], np.zeros((2, 2))
    for item in prepared:
        ids = item.window.ids
        cache, size = through(codec, item.cache, ids[: item.prefix], block_tokens, fidelity)
        stored += size.size_bytes
        expected.append(size.expected_divergence_nats)
        raw += RATIO_BYTES_PER_VALUE * 2 * item.cache[0].numel()
        for i in range(2):
            given, kept = item.cache[i][:, :, _SINKS:].double(), cache[i][:, :, _SINKS:].double()
            errors[i] += (kept - given).square().sum().item(), given.square().sum().item()
        log_q, _ = model.run(ids[item.prefix :], cache)
        kl.append((item.log_p.exp() * (item.log_p - log_q)).sum(-1).double().numpy())
        agree.append((item.log_p.argmax(-1) == log_q.argmax(-1)).double().numpy())
        target = torch.tensor(ids[item.prefix + 1 :])[:, None]
        losses.append(np.stack([-lp[:-1].gather(1, target)[:, 0].double().numpy() for lp in (item.log_p, log_q)]))
    every = np.concatenate(kl)
    before, after = np.concatenate(losses, 1)
    return {
        "ratio": raw / stored,
        "bytes_per_token": stored / sum(item.prefix for item in prepared),
        "kl_mean_nats": float(every.mean()),
        "kl_p99_nats": float(np.quantile(every, 0.99)),
        "expected_divergence_nats": float(np.mean(expected)) if codec.uses_profile else None,
        "perplexity_exact": float(np.exp(before.mean())),
        "perplexity_compressed": float(np.exp(after.mean())),
        "perplexity_factor": float(np.exp((after - before).mean())),
        "perplexity_factor_95": bootstrap([b - a for a, b in losses]),
        "top1_agreement": float(np.concatenate(agree).mean()),
        "key_error": float(errors[0, 0] / errors[0, 1]),
        "value_error": float(errors[1, 0] / errors[1, 1]),
        "kl_by_text_nats": _by_text(prepared, kl),
    }


def _by_text(prepared: Sequence[Prepared], kl: Sequence[np.ndarray]) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for item, values in zip(prepared, kl, strict=True):
        groups.setdefault(item.window.name, []).append(float(values.mean()))
    return {name: sum(means) / len(means) for name, means in groups.items()}


def bootstrap(changes: Sequence[np.ndarray], seed: int = 0) -> list[float]:
    """95 % interval of exp(mean change of loss), from a block bootstrap (Künsch 1989) over runs of 32 tokens."""
    runs = [part for change in changes for part in np.array_split(change, max(1, len(change) // _RUN_TOKENS))]
    means, weights = np.array([r.mean() for r in runs]), np.array([len(r) for r in runs], dtype=float)
    drawn = np.random.default_rng(seed).integers(len(runs), size=(_DRAWS, len(runs)))
    averages = (means[drawn] * weights[drawn]).sum(1) / weights[drawn].sum(1)
    return [float(x) for x in np.exp(np.quantile(averages, [0.025, 0.975]))]


def rounds(model: CachedModel, codec: Codec, prepared: Prepared, block_tokens: int, count: int = 5) -> list[dict[str, float]]:
    """Compress, continue on what came back, compress all of it again, `count` times: a conversation that lives in the store.

    Each round adds an equal share of the window. The divergence of a round is that of its new tokens against a run whose cache was
    never compressed.
    """
    ids = prepared.window.ids
    step = len(ids) // (count + 1)
    _, exact = model.run(ids[:step], logits=False)
    cache, out = exact, []
    for number in range(1, count + 1):
        span = ids[step * number : step * (number + 1)]
        cache, stored = through(codec, cache, ids[: step * number], block_tokens)
        log_p, exact = model.run(span, exact)
        log_q, cache = model.run(span, cache)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        raw = codec.layout.raw_bytes(step * number)
        out.append({"round": number, "tokens": step * number, "ratio": raw / stored.size_bytes, "kl_mean_nats": float(kl.mean())})
    return out
