"""Sums of dL/d(hidden, weight, bias) over pieces of rows.

    dX = c (M W)        dW = M^T (c X)        db = M^T c

Letters: n rows of a piece, D hidden size, V vocabulary, c = dL / dlogp of a row, M as in
`piece_torch.py`. FLOPs: 2nDV for each of dX and dW. Factors are in the inputs' dtype; products and
their sum over pieces in fp32, since rounding each piece to bf16 before summing biases training.
"""

# pyright: strict

from __future__ import annotations

import torch
from torch import Tensor

from ..logprob.rows_torch import row_blocks
from ..logprob.types import accumulation_dtype
from .types import LMHead, LogitGradient


def needed_gradients(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Whether each requires a gradient, and gradients are enabled."""
    enabled = torch.is_grad_enabled()
    return tuple(enabled and x is not None and x.requires_grad for x in tensors)


class GradientAccumulator:
    """Sums of dL/d(hidden, weight, bias) over pieces; only those asked for.

    With one piece the weight gradient is one product, in the weight's dtype, except in fp16, whose
    range is too small for coefficients; with more it is summed in fp32.
    """

    def __init__(
        self, hidden: Tensor, head: LMHead, need: tuple[bool, bool, bool], num_pieces: int
    ) -> None:
        self.head, self.dtype = head, hidden.dtype
        self.sum_dtype = accumulation_dtype(hidden.dtype)
        self.one_piece = num_pieces == 1 and hidden.dtype != torch.float16
        need_hidden, self.need_weight, self.need_bias = need
        assert head.bias is not None or not self.need_bias
        self.hidden = torch.zeros_like(hidden) if need_hidden else None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(
        self,
        rows: slice | Tensor,
        hidden: Tensor,
        logit_gradient: LogitGradient,
        coefficients: Tensor | None,
    ) -> None:
        """Add the gradient of sum_i c_i log p_i over the n `rows`, whose hidden states are given.

        `coefficients` c (n,), None for 1 each.
        """
        c = logit_gradient.row_scale
        if coefficients is not None:
            c = coefficients if c is None else c * coefficients
        matrix = logit_gradient.matrix
        if self.hidden is not None:
            grad = _product(matrix, self.head.weight, self.sum_dtype)
            if c is not None:
                grad.mul_(c[:, None])
            self.hidden[rows] = grad.to(self.dtype)
        if self.need_weight and self.one_piece:
            scaled = hidden if c is None else (hidden * c[:, None]).to(self.dtype)
            self.weight = matrix.T @ scaled
        elif self.need_weight:
            self.weight = _add_product(self.weight, matrix.T, hidden, c, self.sum_dtype)
        if self.need_bias:
            ones = matrix.new_ones(len(matrix), 1)
            self.bias = _add_product(self.bias, matrix.T, ones, c, self.sum_dtype)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dL/d hidden, dL/d weight, dL/d bias) in the inputs' dtypes, None where not asked for."""
        weight, bias = self.weight, self.bias
        if self.need_weight and weight is None:  # no piece came
            weight = torch.zeros_like(self.head.weight)
        if self.need_bias and bias is None:
            bias = self.head.weight.new_zeros(self.head.weight.shape[0], 1)
        return (
            self.hidden,
            None if weight is None else weight.to(self.dtype),
            None if bias is None else bias.squeeze(1).to(self.dtype),
        )


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b, rounded to `dtype` only."""
    if a.dtype == dtype or not a.is_cuda:
        return (a @ b).to(dtype)
    return torch.mm(a, b, out_dtype=dtype)


def _add_product(
    out: Tensor | None, a: Tensor, b: Tensor, c: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """out + a (c b), summed in `dtype` (fp32) into `out`, None for 0; a (V, n), b (n, D), c (n,).

    Factors are rounded to the dtype of a, products never.
    """
    if a.dtype == dtype:
        b = b if c is None else b * c[:, None]
        return a @ b if out is None else out.addmm_(a, b)
    if not a.is_cuda:  # no such product: a tile of rows at a time, so that a's copy stays small
        b = b.to(dtype) if c is None else b * c[:, None]
        total = a.new_empty(a.shape[0], b.shape[1], dtype=dtype) if out is None else out
        for rows in row_blocks(*a.shape):
            tile = a[rows].to(dtype)
            if out is None:
                torch.mm(tile, b, out=total[rows])
            else:
                total[rows].addmm_(tile, b)
        return total
    if a.dtype == torch.float16 and c is not None:  # c b may leave fp16's range: take c's size off
        size = c.abs().amax().clamp_(min=torch.finfo(c.dtype).tiny)
        part = torch.mm(a, (b * (c / size)[:, None]).to(a.dtype), out_dtype=dtype).mul_(size)
        return part if out is None else out.add_(part)
    b = b if c is None else (b * c[:, None]).to(a.dtype)
    if out is None:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.addmm(out, a, b, out_dtype=dtype, out=out)
