"""The lm_head on a piece of rows: raw logits -> statistics and the gradient of the log-prob by
them. The specification.

    raw = h W^T + bias        z = softcap(logit_scale raw) / tau        softcap(x) = c tanh(x / c)
    M_v = d log p(y) / d raw_v = ([v = y] - p_v) (1 - tanh^2) logit_scale / tau

M is made while the row is at hand and written over the raw logits: with c the coefficient of each
row in the loss, the gradient is then dX = c (M W), dW = M^T (c X), db = M^T c, and no elementwise
pass over [n, V] is left to do once c is known.

Letters: n rows of a piece, D hidden size, V vocabulary. The product runs in the inputs' dtype,
statistics in fp32. FLOPs: 2nDV. Held: one [n, V] tensor, and fp32 copies of a block of its rows.
"""

# pyright: strict

from __future__ import annotations

import torch
from torch import Tensor

from ..logprob.rows_torch import block_gradient_, block_statistics, row_blocks
from ..logprob.types import RowStatistics, accumulation_dtype
from .types import LMHead, LogitGradient


def forward_piece_torch(
    hidden: Tensor,
    head: LMHead,
    token_ids: Tensor,
    want_entropy: bool,
    want_gradient: bool,
    upstream: tuple[Tensor, Tensor] | None,
) -> tuple[RowStatistics, LogitGradient | None]:
    """Statistics of the rows hidden (n, D) at token_ids (n,), and M with `want_gradient`.

    With `upstream` = (dL/d(log-prob), dL/d(entropy)), each (n,), M is dL / d raw.
    """
    raw = torch.nn.functional.linear(hidden, head.weight, head.bias)
    dtype, want_entropy = accumulation_dtype(raw.dtype), want_entropy or upstream is not None
    # allocated first: small tensors kept from each block would cut up the memory of the next ones
    columns = [raw.new_empty(raw.shape[0], dtype=dtype) for _ in range(4)]
    columns.append(raw.new_empty(raw.shape[0] if want_entropy else 0, dtype=dtype))
    for rows in row_blocks(*raw.shape):  # the elementwise work, block by block in the cache
        ids = token_ids[rows]
        z, slope = head.transform(raw[rows].to(dtype))
        statistics, e = block_statistics(z, ids, head.temperature, want_entropy)
        for column, values in zip(columns, statistics, strict=True):
            if column.numel():
                column[rows] = values
        if want_gradient:
            if upstream is None:
                d = block_gradient_(e, None, ids, statistics, z.new_ones(len(ids)), None)
            else:
                grad, grad_entropy = upstream
                d = block_gradient_(e, z, ids, statistics, grad[rows], grad_entropy[rows])
            if slope is not None:
                d.mul_(slope)
            if head.slope != 1.0:
                d.mul_(head.slope)
            raw[rows] = d  # in the raw logits' place: nobody needs them again
    return RowStatistics(*columns), LogitGradient(raw, None) if want_gradient else None
