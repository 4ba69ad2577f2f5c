"""Checks of the arguments that all ops with token ids share."""

# pyright: strict

from __future__ import annotations

import torch
from torch import Tensor


def check_token_ids(token_ids: Tensor, shape: torch.Size) -> None:
    """Raise ValueError unless `token_ids` is an integer tensor of `shape`."""
    if token_ids.shape != shape or token_ids.is_floating_point() or token_ids.dtype == torch.bool:
        raise ValueError(
            f"token_ids must be an integer tensor of shape {tuple(shape)}, one id per row, "
            f"got {token_ids.dtype} of shape {tuple(token_ids.shape)}."
        )


def check_token_range(token_ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless all ids lie in [0, V).

    Ids on a GPU are not checked: that would wait for the device.
    """
    if token_ids.numel() and token_ids.device.type == "cpu":
        low, high = int(token_ids.min()), int(token_ids.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"token_ids must lie in [0, {vocab_size}), got {low} to {high}.")


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless `temperature` is positive."""
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}.")
