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

from ..dispatch import use_triton
from ..logprob.rows_torch import row_blocks
from ..logprob.types import accumulation_dtype
from .piece import num_processors
from .types import LMHead, LogitGradient
from .waves import best_parts


def needed_gradients(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Whether each requires a gradient, and gradients are enabled."""
    enabled = torch.is_grad_enabled()
    return tuple(enabled and x is not None and x.requires_grad for x in tensors)


def weight_sum_dtype(hidden: Tensor, num_rows: int, size: int) -> torch.dtype:
    """The dtype in which the loss hands over dW of `num_rows` rows in pieces of `size`.

    On a GPU the fp32 sum itself: backward rounds it together with its upstream factor.
    """
    if not hidden.is_cuda:  # asked first: torch.compile would guard the number of rows
        return hidden.dtype
    one_piece = num_rows <= size and hidden.dtype != torch.float16
    return hidden.dtype if one_piece else accumulation_dtype(hidden.dtype)


class GradientAccumulator:
    """Sums of dL/d(hidden, weight, bias) over pieces; only those asked for.

    With one piece the weight gradient is one product, in the weight's dtype, except in fp16, whose
    range is too small for coefficients; with more it is summed in fp32. Every row of hidden is to
    be added once, or set to zero.
    """

    def __init__(
        self, hidden: Tensor, head: LMHead, need: tuple[bool, bool, bool], num_pieces: int
    ) -> None:
        self.head, self.dtype = head, hidden.dtype
        self.sum_dtype = accumulation_dtype(hidden.dtype)
        self.one_piece = num_pieces == 1 and hidden.dtype != torch.float16
        need_hidden, self.need_weight, self.need_bias = need
        assert head.bias is not None or not self.need_bias
        self.hidden = torch.empty_like(hidden) if need_hidden else None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def set_zero(self, rows: Tensor) -> None:
        """dL/dhidden of the rows at these indices."""
        if self.hidden is not None:
            self.hidden[rows] = 0

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
            parts = parts_of_product(matrix, self.head.weight)
            grad = product(matrix, self.head.weight, self.sum_dtype, parts)
            if isinstance(rows, slice):
                _scale_rows(grad, c, out=self.hidden[rows])
            else:
                self.hidden[rows] = _scale_rows(
                    grad, c, out=grad.new_empty(grad.shape, dtype=self.dtype)
                )
        if self.need_weight and self.one_piece:
            self.weight = matrix.T @ _scaled_rows(hidden, c, self.dtype)
        elif self.need_weight:
            self.weight = _add_product(self.weight, matrix.T, hidden, c, self.sum_dtype)
        if self.need_bias:
            ones = matrix.new_ones(len(matrix), 1)
            self.bias = _add_product(self.bias, matrix.T, ones, c, self.sum_dtype)

    def finish(
        self, weight_dtype: torch.dtype | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dL/d hidden, dL/d weight, dL/d bias), None where not asked for.

        In the inputs' dtypes, but for the weight's where `weight_dtype` is given.
        """
        weight, bias = self.weight, self.bias
        if self.need_weight and weight is None:  # no piece came
            weight = torch.zeros_like(self.head.weight)
        if self.need_bias and bias is None:
            bias = self.head.weight.new_zeros(self.head.weight.shape[0], 1)
        return (
            self.hidden,
            None if weight is None else weight.to(weight_dtype or self.dtype),
            None if bias is None else bias.squeeze(1).to(self.dtype),
        )


def _scale_rows(x: Tensor, c: Tensor | None, out: Tensor) -> Tensor:
    """out = c x, rounded once; x (n, D), c (n,) or None for 1; x may be overwritten.

    On a GPU it is one pass: x loaded and `out` stored.
    """
    if c is None:
        return out.copy_(x)
    if x.is_cuda or x.dtype == out.dtype:
        return torch.mul(x, c[:, None], out=out)
    return out.copy_(x.mul_(c[:, None]))  # there `out` of another dtype would take a copy of x


def _scaled_rows(x: Tensor, c: Tensor | None, dtype: torch.dtype) -> Tensor:
    """c x in `dtype`, computed in that of c; x (n, D), c (n,) or None for 1."""
    if c is None:
        return x.to(dtype)
    if x.is_cuda:  # one pass
        return torch.mul(x, c[:, None], out=torch.empty_like(x, dtype=dtype))
    return (x * c[:, None]).to(dtype)


def parts_of_product(a: Tensor, b: Tensor) -> int:
    """In how many parts a b is made: 1, but on a GPU more where that fills its processors."""
    processors = num_processors(a)
    if processors is None:
        return 1
    return best_parts(len(a), b.shape[1], len(b), processors)[1]


def product(a: Tensor, b: Tensor, dtype: torch.dtype, parts: int) -> Tensor:
    """a b, rounded to `dtype` only, as the sum of products over `parts` of the depth."""
    plain = a.dtype == dtype
    if parts > 1:
        width = len(b) // parts
        a, b = a.view(len(a), parts, width).transpose(0, 1), b.view(parts, width, b.shape[1])
        return (torch.bmm(a, b) if plain else torch.bmm(a, b, out_dtype=dtype)).sum(0)
    if plain or not a.is_cuda:
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
    if out is not None and a.dtype == torch.bfloat16 and use_triton(a):
        from .weight_triton import add_in_memory, adds_in_memory

        scaled = _scaled_rows(b, c, a.dtype)
        if adds_in_memory(out, a.T, scaled):
            add_in_memory(out, a.T, scaled)
            return out
        b, c = scaled, None
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
        part = torch.mm(a, _scaled_rows(b, c / size, a.dtype), out_dtype=dtype).mul_(size)
        return part if out is None else out.add_(part)
    b = _scaled_rows(b, c, a.dtype)
    if out is None:
        return torch.mm(a, b, out_dtype=dtype)
    # beta = 1: each tile of the product loads the sum's before it stores. torch takes an fp32 sum
    # beside bf16 factors since pytorch#167931, November 2025
    return torch.addmm(out, a, b, out_dtype=dtype, out=out)
