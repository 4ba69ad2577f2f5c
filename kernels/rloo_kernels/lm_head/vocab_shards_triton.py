"""`vocab_shards_torch.py` on a GPU, by the two ways to the logits of `piece_triton.py`.

"library": the row kernels read this rank's fp32 logits twice, with all ranks' statistics the
second time. "matrix": the kernel stores E relative to this rank's anchor before the others are
heard of, and M follows by a factor per row: with Z_r the sum over this rank's columns and the
token, and Z that over all ranks',

    M_v = (Z_r / Z) M_v of this rank alone,  v != y            M_y = 1 - p_y, on the rank that has y

`_finish_kernel` puts both in place: it touches the row scale and one number of each row. Where
Z_r / Z is so small that M_y would leave its range, it drops the rest of the row, all but 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import on_device_of
from ..logprob.math_triton import LN2, cap_mode, exponent_factors
from ..logprob.rows_triton import backward_triton_, forward_triton
from ..logprob.types import RowStatistics
from .matrix_triton import label_logits, matrix_piece
from .piece_triton import raw_logits, uses_matrix_kernel
from .types import LMHead, LogitGradient
from .vocab_shards import LEAST, ShardSums, SplitLabels, all_shards

LARGEST = tl.constexpr(2.0**100)  # of a stored M_y; with a row of W it stays within fp32


@triton.jit
def _finish_kernel(
    matrix, columns, label, rest, share, row_scale, V, pitch, softcap, slope,
    MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of M: its scale times Z_r / Z, and M_y in units of it."""
    row = tl.program_id(0)
    y = tl.load(columns + row)
    factor = tl.load(share + row)
    scale = tl.where(factor == 0, 0.0, tl.load(row_scale + row) * factor)
    if y >= 0:
        mine = tl.load(rest + row)
        if MODE == 1:  # d softcap / d raw = 1 - tanh^2
            t = tl.load(label + row) / softcap
            mine *= 1.0 - t * t
        entry = mine * slope / scale
        at = matrix + row.to(tl.int64) * pitch
        if not (tl.abs(entry) < LARGEST):  # nan too, where the scale is 0
            lane = tl.arange(0, BLOCK)
            for start in range(0, V, BLOCK):
                column = start + lane  # M_y among them: two stores to one place would race
                value = tl.where(column == y, mine, 0.0)
                tl.store(at + column, value.to(matrix.dtype.element_ty), mask=column < V)
            scale = slope
        else:
            tl.store(at + y, entry.to(matrix.dtype.element_ty))
    tl.store(row_scale + row, scale)


def label_logits_triton(hidden: Tensor, head: LMHead, columns: Tensor) -> Tensor:
    """z_y (n,) as the kernels have it (`math_triton.cap`); nan where the column is -1."""
    weight = head.weight if head.weight.stride(1) == 1 else head.weight.contiguous()
    with on_device_of(hidden):
        return label_logits(hidden.contiguous(), head._replace(weight=weight), columns)


def split_piece_triton(
    hidden: Tensor,
    head: LMHead,
    labels: SplitLabels,
    want_entropy: bool,
    want_gradient: bool,
    upstream: tuple[Tensor, Tensor] | None,
) -> tuple[RowStatistics, LogitGradient | None]:
    """`split_piece_torch`, by kernels."""
    per_unit = exponent_factors(head.temperature, head.softcap, head.logit_scale)[0] * LN2.value
    if upstream is None and uses_matrix_kernel(hidden, head.weight, want_gradient):
        with on_device_of(hidden):
            mine, gradient = matrix_piece(
                hidden, head, labels.columns, want_entropy, want_gradient, labels.anchors
            )
            statistics = all_shards(_sums(mine, labels, per_unit), labels, per_unit)
            if gradient is not None:
                shift = (mine.top - statistics.top) * per_unit
                share = (shift + mine.log_total - statistics.log_total).exp()
                share.masked_fill_(_nothing(mine), 0.0)
                _finish(gradient, head, labels, statistics, share)
        return statistics, gradient
    raw = raw_logits(hidden, head)
    transform = {"softcap": head.softcap, "logit_scale": head.logit_scale}
    want_entropy = want_entropy or upstream is not None
    mine = forward_triton(
        raw, labels.columns, None, head.temperature, want_entropy,
        label_logits=labels.anchors, **transform,
    )  # fmt: skip
    statistics = all_shards(_sums(mine, labels, per_unit), labels, per_unit)
    if not want_gradient:
        return statistics, None
    grad, grad_entropy = upstream or (torch.ones_like(statistics.logps), None)
    matrix = torch.empty_like(raw, dtype=hidden.dtype)
    backward_triton_(
        matrix, raw, labels.columns, None, statistics, grad, grad_entropy, head.temperature,
        **transform,
    )  # fmt: skip
    return statistics, LogitGradient(matrix, None)


def _sums(mine: RowStatistics, labels: SplitLabels, per_unit: float) -> ShardSums:
    """This rank's sums, out of the statistics of its columns and the token."""
    total, nothing = mine.log_total.exp(), _nothing(mine)
    spread = None
    if mine.entropy.numel():
        x_y = (labels.anchors - mine.top) * per_unit
        spread = (mine.log_total - mine.entropy) * total - x_y.exp() * x_y
        spread.masked_fill_(nothing, 0.0)
    return ShardSums(mine.top, (mine.rest * total).masked_fill_(nothing, 0.0), spread)


def _nothing(mine: RowStatistics) -> Tensor:
    """(n,) Whether neither the token nor a column of this rank is possible: then nothing but `top`
    need be a number."""
    return mine.top <= LEAST


def _finish(
    gradient: LogitGradient, head: LMHead, labels: SplitLabels, statistics: RowStatistics,
    share: Tensor,
) -> None:  # fmt: skip
    """M of this rank alone -> of all ranks, in place; share (n,) = Z_r / Z."""
    n = len(labels)
    if n == 0:
        return
    assert gradient.row_scale is not None
    vocab_size, pitch = gradient.matrix.shape[1], gradient.matrix.stride(0)
    softcap = 0.0 if head.softcap is None else head.softcap
    _finish_kernel[(n,)](
        gradient.matrix, labels.columns.contiguous(), labels.logits.contiguous(), statistics.rest,
        share, gradient.row_scale, vocab_size, pitch, softcap, head.slope,
        MODE=cap_mode(head.softcap, head.logit_scale), BLOCK=1024, num_warps=4,
    )  # fmt: skip
