"""Checks of hidden states and an lm_head."""

# pyright: strict

from __future__ import annotations

from torch import Tensor

from ..logprob.checks import check_temperature


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> None:
    """Raise ValueError for hidden (..., D), weight (V, D), bias (V,) that do not fit together."""
    if hidden.ndim < 2 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be (N, D) and weight (V, D) with the same D, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}.")
    dtypes = [x.dtype for x in (hidden, weight, bias) if x is not None]
    if len(set(dtypes)) > 1:
        raise ValueError(f"hidden, weight and bias must have the same dtype, got {dtypes}.")
    check_temperature(temperature)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0, or None for none, got {softcap}.")
