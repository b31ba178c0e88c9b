"""Calibration: from samples of a model's K, V and gradients to a `Profile` (DESIGN §5). Tensors in, tensors out; no model library.

One pass over the samples gathers moments. Every fourth sample is kept aside as well: the spread and shape of the coefficients are
measured on texts that the basis has not seen, or the rates would be optimistic. The basis that is stored is fitted to all samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvstore.errors import InvalidInputError
from kvstore.layout import KVLayout

from .base import KVSample
from .profile import Profile, shape_of
from .transform import fit, models
from .transform.groups import Group, plan
from .transform.moments import Moments, rows_of

#: Every how manieth sample measures the models instead of only fitting the basis.
HELD_OUT = 4
#: Coefficients are sorted into this many shapes by E|c| / sigma.
SHAPES = 4
#: Most standardized magnitudes that one shape's distribution is fitted to.
SHAPE_SAMPLES = 2_000_000
RANK = 192


@dataclass(frozen=True, slots=True)
class _Held:
    x_NC: torch.Tensor
    tokens_N: torch.Tensor


@torch.no_grad()
def calibrate(
    layout: KVLayout,
    samples: Iterable[KVSample],
    embeddings: torch.Tensor | None = None,
    *,
    groups: int | str = "auto",
    continued: int = 256,
    facts: dict[str, str | int | float] | None = None,
) -> Profile:
    """Learn a profile.

    Parameters
    ----------
    layout : KVLayout
    samples : iterable of KVSample
        Read once. At least 2; about 50,000 tokens of mixed text do well.
    embeddings : Tensor [vocabulary, E], optional
        The model's input embeddings; without them nothing is predicted from tokens.
    groups : int or "auto"
        Runs of model layers that are transformed together.
    continued : int
        Tokens whose log-likelihood the samples' gradients are of; only the estimate of divergence uses it.
    facts : dict, optional
        Kept in the profile's metadata, such as the model's name.

    Raises
    ------
    InvalidInputError
        For too few samples, NaN or Inf in one, or a token id that has no embedding.
    LayoutMismatchError
        For samples of another layout.
    """
    plan_ = plan(layout, groups)
    features = 0 if embeddings is None else embeddings.shape[1] + 1
    fitted, everything, held = _gather(layout, samples, embeddings, plan_, features)
    if not held or fitted.count < 2:
        raise InvalidInputError("calibration needs at least two samples with tokens beyond the first four; give more text")
    a = fit.sensitivities(everything)
    rank = min(RANK, features, layout.values_per_token)
    models_, kappa, shape = _measure(fitted, a, rank, held, embeddings)
    p, q = fit.predictor(everything, a, rank) if features else (None, None)
    harm, share = fit.harm_weights(everything, a)
    tensors = {
        "mean": everything.mean_C,
        "weight": a.float(),
        "kappa": torch.from_numpy(kappa),
        "shape": torch.from_numpy(shape),
        **{f"basis.{i}": u.half() for i, u in enumerate(fit.bases(everything, a, p, q))},
        **_tables(models_),
        **({} if harm is None else {"harm": harm}),
    }
    if p is not None and q is not None and embeddings is not None:
        tensors |= _prediction(a, p, q, embeddings, plan_)
    known = {
        "groups": [g.last - g.first for g in plan_],
        "tokens": everything.count,
        "sensitivities": bool(everything.fisher_count),
        "divergence": fit.divergence_scale(everything, a, continued, share),
    }
    return Profile(shape_of(layout), known | (facts or {}), tensors)


def _gather(
    layout: KVLayout, samples: Iterable[KVSample], embeddings: torch.Tensor | None, groups: Sequence[Group], features: int
) -> tuple[Moments, Moments, list[_Held]]:
    """Moments of the samples that fit the basis, moments of all, and the values of those held out (in bfloat16)."""
    fitted, rest, held = Moments(layout, groups, features), Moments(layout, groups, features), []
    for number, sample in enumerate(samples):
        x, tokens = rows_of(layout, sample, groups)
        if not len(x):
            continue
        if fitted.origin is None:
            fitted.origin = rest.origin = x.mean(0)
        if embeddings is not None and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(embeddings):
            raise InvalidInputError(f"a sample has token ids outside the {len(embeddings)} embeddings")
        f = None if embeddings is None else fit.features(embeddings, tokens)
        aside = number % HELD_OUT == 1
        (rest if aside else fitted).add(sample, x, f)
        if aside:
            held.append(_Held(x.bfloat16(), tokens))
    return fitted, fitted.plus(rest) if held else fitted, held


def _measure(
    fitted: Moments, a: torch.Tensor, rank: int, held: Sequence[_Held], embeddings: torch.Tensor | None
) -> tuple[models.Models, np.ndarray, np.ndarray]:
    """Models, and kappa and shape of each coefficient, on the held-out samples."""
    p, q = fit.predictor(fitted, a, rank) if embeddings is not None else (None, None)
    basis = fit.bases(fitted, a, p, q, torch.float32)
    parts = []
    for h in held:
        y = fit.weigh(a, h.x_NC.float() - fitted.mean_C, fitted.groups)
        if p is not None and q is not None and embeddings is not None:
            y -= fit.features(embeddings, h.tokens_N) @ p.float() @ q.float()
        parts.append(torch.cat([y[:, g.columns] @ u.float() for g, u in zip(fitted.groups, basis, strict=True)], 1))
    c = torch.cat(parts)
    sigma = c.square().mean(0).sqrt().clamp_min(1e-30)
    # Within a group the order of the basis stands; sigma by rank makes it fall strictly, and lets the final basis inherit it.
    for g in fitted.groups:
        sigma[g.columns] = sigma[g.columns].sort(descending=True).values
    tails = (c.abs().mean(0) / c.square().mean(0).sqrt().clamp_min(1e-30)).numpy()
    edges = np.quantile(tails, np.arange(1, SHAPES) / SHAPES)
    shape = np.searchsorted(edges, tails).astype(np.uint8)
    pools = []
    for k in range(SHAPES):
        members = torch.from_numpy(np.flatnonzero(shape == k))
        z = (c[:, members] / c[:, members].square().mean(0).sqrt().clamp_min(1e-30)).flatten()
        pools.append(z[:: max(1, len(z) // SHAPE_SAMPLES)].numpy() if len(z) else np.array([0.0]))
    kappa = (models.OCTAVE * sigma.double().log2()).round().to(torch.int32).numpy()
    return models.fit(pools), kappa, shape


def _prediction(
    a: torch.Tensor, p: torch.Tensor, q: torch.Tensor, embeddings: torch.Tensor, groups: Sequence[Group]
) -> dict[str, torch.Tensor]:
    """The predictor as stored: a row of `rank` numbers for each token id, and the map from those to values."""
    table = torch.cat([fit.features(embeddings, ids) @ p.float() for ids in torch.arange(len(embeddings)).split(8192)])
    # Balance the two factors, so that neither leaves float16's range.
    scale = table.square().mean(0).sqrt().clamp_min(1e-12)
    to_values = fit.weigh(fit.inverse(a), q, groups).float() * scale[:, None]
    return {"predict.table": (table / scale).half(), "predict.map": to_values.half()}


def _tables(m: models.Models) -> dict[str, torch.Tensor]:
    arrays = {
        "models.freq": m.book.freq.astype(np.int16), "models.first": m.book.first, "models.shift": m.book.shift,
        "models.escape": m.book.escape, "models.zero": m.zero.astype(np.int32), "models.centre": m.centre,
    }  # fmt: skip
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
