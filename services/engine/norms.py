"""Which modules of a model are root-mean-square normalizations (Zhang and Sennrich, 2019), so that quicker ones can stand for them.

Models define their own; some scale by 1 + weight. Which it is, if any of these, a module tells by what it makes of noise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def weight_and_eps(module: nn.Module) -> tuple[torch.Tensor, float] | None:
    """Weight [channels] and epsilon of what looks like an RMSNorm; None for any other module."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or weight is None or eps is None or weight.dim() != 1:
        return None
    return weight.detach(), eps


def same_on_noise(ours: nn.Module, module: nn.Module, rtol: float, atol: float) -> bool:
    """Whether both make the same of noise, within these tolerances."""
    noise = torch.randn((3, len(module.weight)), generator=torch.Generator().manual_seed(0), device="cpu").to(module.weight)
    return torch.allclose(ours(noise), module(noise), rtol=rtol, atol=atol)


@torch.inference_mode()
def replace_norms(model: nn.Module, fitting: Callable[[nn.Module], nn.Module | None]) -> None:
    """Replace each module of `model` for which `fitting` has another."""
    for name, module in list(model.named_modules()):
        if (ours := fitting(module)) is not None:
            model.set_submodule(name, ours)
