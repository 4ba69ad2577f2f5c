"""The lm_head, and the gradient of a log-prob by its output, as pieces of rows pass them on."""

# pyright: strict

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LMHead(NamedTuple):
    """A linear layer and what the model does to its output before the softmax.

    z = softcap(logit_scale (h W^T + bias)) / tau          softcap(x) = c tanh(x / c)
    """

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    temperature: float
    softcap: float | None
    logit_scale: float

    @property
    def slope(self) -> float:
        """dz / d raw, but for the soft-cap's own derivative."""
        return self.logit_scale / self.temperature

    def transform(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """(tau z, 1 - tanh^2 or None where there is no soft-cap)."""
        z = raw * self.logit_scale if self.logit_scale != 1.0 else raw
        slope = None
        if self.softcap is not None:
            tanh = torch.tanh(z / self.softcap)
            z, slope = self.softcap * tanh, 1.0 - tanh * tanh
        return z, slope


class LogitGradient(NamedTuple):
    """M = d log p(y) / d raw of a piece of n rows, as row_scale[:, None] * matrix."""

    matrix: Tensor  # (n, V) in the hidden states' dtype; its rows may be further apart than V
    row_scale: Tensor | None  # (n,) fp32, fp64 for fp64; None: 1

    def padded(self) -> Tensor:
        """The matrix with the padding between its rows, contiguous: (n, distance of two rows)."""
        width = self.matrix.stride(0)
        return self.matrix.as_strided((self.matrix.shape[0], width), (width, 1))

    def select(self, index: Tensor) -> LogitGradient:
        """The rows at `index`."""
        scale = None if self.row_scale is None else self.row_scale[index]
        return LogitGradient(self.matrix[index], scale)
