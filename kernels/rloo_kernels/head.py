"""The lm_head on a piece of rows: raw logits -> statistics and the weights of the gradient.

    raw = h W^T + bias        z = softcap(logit_scale raw) / tau        softcap(x) = c tanh(x / c)
    M_v = d log p(y) / d raw_v = ([v = y] - p_v) (1 - tanh^2) logit_scale / tau

M is made while the row is at hand and written over the raw logits: with c the coefficient of each
row in the loss, the gradient is then dX = c (M W), dW = M^T (c X), db = M^T c, and no elementwise
pass over [n, V] is left to do once c is known.

Letters: n rows of a piece, D hidden size, V vocabulary. Products run in the inputs' dtype,
statistics and sums over pieces in fp32. FLOPs: forward 2nDV, each of dX and dW 2nDV.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import use_triton
from .logprob import (
    RowStatistics,
    accumulation_dtype,
    block_gradient_,
    block_statistics,
    row_blocks,
)

# What a piece of logits may take. Pieces of fp32 are summed into the weight gradient at no cost;
# pieces of bf16 and fp16 cost an fp32 copy of it, so they are fewer and larger.
PIECE_BYTES = {torch.float32: 384 << 20, torch.float64: 384 << 20}
PIECE_BYTES_HALF = 768 << 20


class Head(NamedTuple):
    """A linear layer and what the model does to its output before the softmax."""

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


class Weights(NamedTuple):
    """d log p(y) / d raw of a piece, as row_scale[:, None] * matrix."""

    matrix: Tensor  # (n, V) in the hidden states' dtype; its rows may be further apart than V
    row_scale: Tensor | None  # (n,) fp32; None: 1

    def whole(self) -> Tensor:
        """The matrix with what lies between its rows, contiguous: (n, `weights_width`)."""
        width = self.matrix.stride(0)
        return self.matrix.as_strided((self.matrix.shape[0], width), (width, 1))


def weights_are_scaled(hidden: Tensor, weight: Tensor) -> bool:
    """Whether a piece's weights come with a row scale: those of the matrix kernel do."""
    if not use_triton(hidden):
        return False
    from .head_triton import uses_matrix_kernel

    return uses_matrix_kernel(hidden, weight, want_weights=True)


def weights_width(hidden: Tensor, weight: Tensor) -> int:
    """Distance between the rows of a piece's weights."""
    if not weights_are_scaled(hidden, weight):
        return weight.shape[0]
    from .head_triton import stored_width

    return stored_width(weight.shape[0])


def piece_rows(hidden: Tensor, vocab_size: int, chunk_bytes: int | None) -> int:
    """The most rows of a piece: its logits take at most `chunk_bytes` (at least one row)."""
    if chunk_bytes is None:
        chunk_bytes = PIECE_BYTES.get(hidden.dtype, PIECE_BYTES_HALF)
    bytes_per_row = vocab_size * hidden.element_size()
    if use_triton(hidden):
        from .head_triton import bytes_per_logit

        bytes_per_row = vocab_size * bytes_per_logit(hidden)
    return max(1, min(hidden.shape[0], chunk_bytes // max(bytes_per_row, 1)))


def pieces(num_rows: int, most: int) -> Iterator[slice]:
    """Slices of nearly equal length, at most `most` rows each."""
    size = -(-num_rows // max(-(-num_rows // most), 1))
    for start in range(0, num_rows, max(size, 1)):
        yield slice(start, min(start + size, num_rows))


def forward_piece(
    hidden: Tensor,
    head: Head,
    token_ids: Tensor,
    *,
    want_entropy: bool = False,
    want_weights: bool = False,
    upstream: tuple[Tensor, Tensor] | None = None,
) -> tuple[RowStatistics, Weights | None]:
    """Statistics of the rows hidden (n, D) at token_ids (n,), and the weights of their gradient.

    With `upstream` = (dL/d(log-prob), dL/d(entropy)) the weights are those of L itself.
    """
    run = forward_piece_torch
    if use_triton(hidden):
        from .head_triton import forward_piece_triton

        run = forward_piece_triton
    return run(hidden, head, token_ids, want_entropy, want_weights, upstream)


def forward_piece_torch(
    hidden: Tensor,
    head: Head,
    token_ids: Tensor,
    want_entropy: bool,
    want_weights: bool,
    upstream: tuple[Tensor, Tensor] | None,
) -> tuple[RowStatistics, Weights | None]:
    """The specification; the row's elementwise work is done block by block, in the cache."""
    raw = torch.nn.functional.linear(hidden, head.weight, head.bias)
    dtype, want_entropy = accumulation_dtype(raw.dtype), want_entropy or upstream is not None
    # allocated first: small tensors kept from each block would cut up the memory of the next ones
    columns = [raw.new_empty(raw.shape[0], dtype=dtype) for _ in range(4)]
    columns.append(raw.new_empty(raw.shape[0] if want_entropy else 0, dtype=dtype))
    for rows in row_blocks(*raw.shape):
        ids = token_ids[rows]
        z, slope = head.transform(raw[rows].to(dtype))
        statistics, e = block_statistics(z, ids, head.temperature, want_entropy)
        for column, values in zip(columns, statistics, strict=True):
            if column.numel():
                column[rows] = values
        if want_weights:
            if upstream is None:
                d = block_gradient_(e, None, ids, statistics, z.new_ones(len(ids)), None)
            else:
                d = block_gradient_(e, z, ids, statistics, *(g[rows] for g in upstream))
            if slope is not None:
                d.mul_(slope)
            if head.slope != 1.0:
                d.mul_(head.slope)
            raw[rows] = d  # in the raw logits' place: nobody needs them again
    return RowStatistics(*columns), Weights(raw, None) if want_weights else None


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


class Gradients:
    """Sums dL/d(hidden, weight, bias) over pieces; only those asked for.

    `num_pieces` 1: the weight gradient is one product, in the weight's dtype; else it is summed in
    fp32, since rounding each piece to bf16 before summing biases training. (In fp16 always: its
    range is too small for coefficients.)
    """

    def __init__(
        self, hidden: Tensor, head: Head, need: tuple[bool, bool, bool], num_pieces: int
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
        self, rows: slice | Tensor, hidden: Tensor, weights: Weights, coefficients: Tensor | None
    ) -> None:
        """The gradient of sum_i coefficients_i log p_i over `rows`, whose hidden states are given.

        `coefficients` (n,), None for 1 each.
        """
        c = weights.row_scale
        if coefficients is not None:
            c = coefficients if c is None else c * coefficients
        matrix = weights.matrix
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
