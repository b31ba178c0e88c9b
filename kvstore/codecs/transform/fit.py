"""From accumulated moments to matrices: sensitivities, prediction, basis. All small linear algebra, in float64.

With x the values of a token (keys unrotated), mu their mean and f the features of its embedding::

    y = A (x - mu)             A block-diagonal, one block for each layer, K or V, and head: an error's harm is |A·error|²
    y ≈ f W                    what the token alone predicts, of low rank
    c = Uᵀ (y - f W)           U orthonormal, one block for each group of layers
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .groups import Group
from .moments import Moments

#: Tempering of the Fisher information: 1 trusts the calibration texts' sensitivities, 0 ignores them.
ALPHA = 0.8
#: Share of the mean eigenvalue that is added to each head's Fisher matrix.
FISHER_FLOOR = 0.02
RIDGE = 1e-3
#: Of the regression that tells tokens' harms, and the runs of tokens in which its worth is measured: the usual block.
HARM_RIDGE = 0.1
RUN_TOKENS = 64
#: Length of the prefix that estimates of divergence assume.
PREFIX_TOKENS = 1024
#: Measured divergence over the second-order estimate, on texts that were not calibrated on: their sensitivities exceed the average.
OBSERVED = 2.5
#: That holds at this estimate; measured divergence grows with the power `GROWTH` of it (from 8 to 32 times on the default model), because
#: what is dropped at high ratios is missing from many tokens alike, and errors that are alike add up.
AGREES_AT, GROWTH = 3e-4, 1.1


def sensitivities(moments: Moments) -> torch.Tensor:
    """A = F^(α/2) for each layer, K or V, and head: float64 [L, 2, H, D, D].

    F is the empirical Fisher information E[g gᵀ]. One scale for all heads: how much heads differ is most of what there is to know.
    Identity matrices without gradients, and for heads that no gradient ever reached.
    """
    dim = moments.layout.head_dim
    eye = torch.eye(dim, dtype=torch.float64)
    if not moments.fisher_count:
        return eye.expand(moments.fisher.shape).clone()
    fisher = moments.fisher.double() / moments.fisher_count
    trace = fisher.diagonal(dim1=-2, dim2=-1).mean(-1)
    scale = trace.mean()
    fisher = fisher / scale + ((trace / scale).clamp_min(1e-6) * FISHER_FLOOR)[..., None, None] * eye
    value, vector = torch.linalg.eigh(fisher)
    return (vector * value.clamp_min(1e-12).pow(ALPHA / 2)[..., None, :]) @ vector.transpose(-1, -2)


def weigh(a_LKHDD: torch.Tensor, rows_NC: torch.Tensor, groups: Sequence[Group]) -> torch.Tensor:
    """Rows times the symmetric block-diagonal matrix A, in the groups' order of columns."""
    out = torch.empty_like(rows_NC)
    for g in groups:
        blocks = a_LKHDD[g.first : g.last].transpose(0, 1).flatten(0, 2)
        rows = rows_NC[:, g.columns].unflatten(1, (len(blocks), -1))
        out[:, g.columns] = torch.einsum("nbd,bde->nbe", rows, blocks.to(rows)).flatten(1)
    return out


def predictor(moments: Moments, a_LKHDD: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """P [F, rank] and Q [rank, C], float64, with y ≈ f P Q: ridge regression, cut to the rank that keeps most of the explained energy."""
    count = moments.count
    delta = (moments.mean_C - moments.origin).double()
    ff = moments.features_FF.double() / count
    cross = moments.cross_FC.double() / count - ff[:, -1:] * delta  # the last feature is the constant 1
    cross = weigh(a_LKHDD, cross, moments.groups)
    ridge = ff + RIDGE * ff.diagonal().mean() * torch.eye(len(ff), dtype=torch.float64)
    root = torch.linalg.cholesky(ridge).T
    full = torch.cholesky_solve(cross, root, upper=True)
    explained = root @ full
    u = torch.linalg.eigh(explained @ explained.T)[1][:, -rank:].flip(1)
    return torch.linalg.solve_triangular(root, u, upper=True), u.T @ explained


def bases(
    moments: Moments, a_LKHDD: torch.Tensor, p_FR: torch.Tensor | None, q_RC: torch.Tensor | None, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    """U of each group, [width, width], columns by falling variance of the residual; float32 suffices to measure spreads with."""
    count = moments.count
    delta = (moments.mean_C - moments.origin).double()
    out = []
    for g, second in zip(moments.groups, moments.second, strict=True):
        blocks = torch.block_diag(*a_LKHDD[g.first : g.last].transpose(0, 1).flatten(0, 2))
        cov = second.double() / count - torch.outer(delta[g.columns], delta[g.columns])
        cov = blocks @ cov @ blocks
        if p_FR is not None and q_RC is not None:
            ff = moments.features_FF.double() / count
            cross = moments.cross_FC[:, g.columns].double() / count - ff[:, -1:] * delta[g.columns]
            w = p_FR @ q_RC[:, g.columns]
            mixed = w.T @ (cross @ blocks)
            cov = cov - mixed - mixed.T + w.T @ ff @ w
        out.append(torch.linalg.eigh(((cov + cov.T) / 2).to(dtype))[1].flip(1))
    return out


def features(embedding_VE: torch.Tensor, tokens_N: torch.Tensor) -> torch.Tensor:
    """[e / rms(e), 1] of each token, float32 [N, E + 1]."""
    e = embedding_VE[tokens_N].float()
    e = e / e.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
    return torch.cat([e, torch.ones(len(e), 1)], 1)


def inverse(a_LKHDD: torch.Tensor) -> torch.Tensor:
    """A⁻¹ of positive definite matrices, by Cholesky: LAPACK's LU of many small matrices at once is not safe in all builds of torch."""
    return torch.cholesky_inverse(torch.linalg.cholesky(a_LKHDD))


def harm_weights(moments: Moments, a_LKHDD: torch.Tensor) -> tuple[torch.Tensor | None, float]:
    """How the sizes of a token's K and V tell the harm of an error in it.

    The harm of white noise in a token's y is g·A⁻²·g; its logarithm is fitted, by ridge regression on standardized features, to the
    logarithms of the sizes of all heads. A head's share of the harm is taken from its gradient's square and its mean A⁻² (0.99
    correlated with the exact one, which would need all gradients kept).

    Returns
    -------
    weights : float32 [L, K, H], or None without gradients
        log2 of the harm, up to a constant, is their sum times `classes.log_sizes`.
    share : float
        Of the mean harm that is left when errors are distributed by these weights within runs of `RUN_TOKENS` tokens.
    """
    if not moments.pulls_LKHT:
        return None, 1.0
    ainv, fisher = inverse(a_LKHDD), moments.fisher.double() / moments.fisher_count
    traces = [(f.diagonal(dim1=-2, dim2=-1)).sum(-1) for f in (ainv @ fisher @ ainv, fisher)]
    scale = (traces[0] / traces[1].clamp_min(1e-30)).float()
    sizes = torch.cat([x.flatten(0, 2).T for x in moments.sizes_LKHT]).double()
    harm = torch.cat([(x * scale[..., None]).sum((0, 1, 2)) for x in moments.pulls_LKHT]).double()
    log_harm = harm.clamp_min(float(harm.mean()) * 1e-9 + 1e-300).log2()
    deviation = sizes.std(0, correction=0).clamp_min(1e-6)
    z = (sizes - sizes.mean(0)) / deviation
    gram = z.T @ z / len(z) + HARM_RIDGE * torch.eye(z.shape[1], dtype=torch.float64)
    weights = torch.cholesky_solve(z.T @ (log_harm - log_harm.mean())[:, None] / len(z), torch.linalg.cholesky(gram))[:, 0] / deviation
    expected, left = sizes @ weights, 0.0
    for run, told in zip(harm.split(RUN_TOKENS), expected.split(RUN_TOKENS), strict=True):
        left += float((run * torch.exp2(told.mean() - told)).sum())
    return weights.view(scale.shape).float(), left / max(float(harm.sum()), 1e-300)


def divergence_scale(moments: Moments, a_LKHDD: torch.Tensor, continued: int, share: float) -> float:
    """Nats a continued token for each unit of mean squared coefficient error, over a prefix of 1,024 tokens; 0 without gradients.

    `share` is that of `harm_weights`.

    To second order an error e of one token costs ½·eᵀFe nats over the continuation, and e = A⁻¹·(error of y). Reverse water-filling
    leaves y's error nearly white, so that E[eᵀFe] is its mean square times tr(A⁻¹FA⁻¹).
    """
    if not moments.fisher_count:
        return 0.0
    ainv = inverse(a_LKHDD)
    trace = (ainv @ (moments.fisher.double() / moments.fisher_count) @ ainv).diagonal(dim1=-2, dim2=-1).sum()
    return float(OBSERVED * 0.5 * share * trace * PREFIX_TOKENS / continued)
