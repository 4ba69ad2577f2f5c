"""What the torch and the Triton implementation of a log-prob hand back."""

# pyright: strict

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RowStatistics(NamedTuple):
    """What the log-prob of a row of logits is made of; each (N,) in the accumulation dtype.

    The letters are those of `rows_torch.py`. Rows that a mask leaves out hold 0.
    """

    logps: Tensor  # log p(y)
    top: Tensor  # max_v z_v
    log_total: Tensor  # log S
    rest: Tensor  # 1 - p(y)
    entropy: Tensor  # H in nats; empty if not asked for


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What statistics and sums of `dtype` are kept in: fp32, and fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
