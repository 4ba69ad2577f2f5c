"""Check that a weight update wrote every element of an engine's model: NaN marks the others."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def poison(model: nn.Module) -> None:
    """Fill every floating-point parameter with NaN, in place."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.fill_(float("nan"))


@torch.no_grad()
def uncovered(model: nn.Module) -> list[str]:
    """Names of the parameters that still hold a NaN; of tied parameters only the first."""
    return [
        name
        for name, parameter in model.named_parameters()
        # the largest of some numbers is NaN if one of them is; isnan() would make a tensor as large
        if parameter.is_floating_point() and parameter.numel() and bool(parameter.amax().isnan())
    ]
