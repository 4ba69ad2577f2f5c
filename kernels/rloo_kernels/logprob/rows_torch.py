"""Logits -> log-probability of one token per row, and the entropy of the row: the specification.

    x_v      = (z_v - max_u z_u) / tau                    S = sum_v exp(x_v)
    log p(y) = x_y - log S                                H = log S - sum_v exp(x_v) x_v / S

    d log p(y) / d z_v = ([v = y] - p_v) / tau            d H / d z_v = - p_v (log p_v + H) / tau

Letters: N rows, n rows of a block, V vocabulary. All statistics are fp32 (fp64 for fp64 logits),
whatever the logits' dtype. The maximum is subtracted first, so that an offset of the logits and a
small temperature cost no digits; the token's own term stays out of the sum, so that 1 - p_y and
log p_y keep their digits as p_y -> 1.

Rows are worked on in blocks that fit the cache: no fp32 copy of all logits exists. Bytes, b per
logit: forward N V b read, for log-prob and entropy together; backward N V b read and N V b written.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .types import RowStatistics, accumulation_dtype

BLOCK_BYTES = 1 << 20  # the fp32 copy of a block of rows stays in a core's cache
# exp(LOWEST) is 0 in every dtype. Times 0 it is 0, which -inf is not.
LOWEST = -1e4


def forward_torch(
    logits: Tensor, token_ids: Tensor, keep: Tensor | None, temperature: float, want_entropy: bool
) -> RowStatistics:
    """Statistics of logits (..., V) at token_ids (N,); rows where keep (N,) is False give 0."""
    num_rows, dtype = token_ids.numel(), accumulation_dtype(logits.dtype)
    columns = [logits.new_zeros(num_rows, dtype=dtype) for _ in range(4)]
    columns.append(logits.new_zeros(num_rows if want_entropy else 0, dtype=dtype))
    for first, part in _matrices(logits):
        for rows in row_blocks(*part.shape):
            here = slice(first + rows.start, min(first + rows.stop, first + len(part)))
            block = part[rows].to(dtype)
            found, _ = block_statistics(
                block, token_ids[here], temperature, want_entropy, logits.dtype != dtype
            )
            for column, values in zip(columns, found, strict=True):
                if column.numel():
                    column[here] = values
    if keep is not None:
        columns = [c.masked_fill_(~keep, 0.0) if c.numel() else c for c in columns]
    return RowStatistics(*columns)


def backward_torch_(
    out: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    keep: Tensor | None,
    statistics: RowStatistics,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
) -> None:
    """dL/dlogits into `out` (..., V), which may be `logits`.

    `grad` and `grad_entropy` (N,) are dL/d(log-prob) and dL/d(entropy), None for 0.
    """
    dtype = statistics.logps.dtype
    grad, grad_entropy = (g if g is None else g / temperature for g in (grad, grad_entropy))
    for (first, part), (_, target) in zip(_matrices(logits), _matrices(out), strict=True):
        for rows in row_blocks(*part.shape):
            here = slice(first + rows.start, min(first + rows.stop, first + len(part)))
            s = RowStatistics(*(c[here] if c.numel() else c for c in statistics))
            x = _divide_(part[rows].to(dtype) - s.top[:, None], temperature)
            g, gh = (None if v is None else v[here] for v in (grad, grad_entropy))
            d = block_gradient_(x.exp(), x, token_ids[here], s, g, gh)
            if keep is not None:  # a masked row may hold nan, which 0 does not cancel
                d.masked_fill_(~keep[here, None], 0.0)
            target[rows] = d.to(out.dtype)


def block_statistics(
    z: Tensor, token_ids: Tensor, temperature: float, want_entropy: bool, overwrite: bool = True
) -> tuple[RowStatistics, Tensor]:
    """Statistics of a block of logits z (n, V), and exp(x) with the token's own entry set to 0.

    With `overwrite`, x is left in z where entropy is wanted, else exp(x).
    """
    ids = token_ids[:, None]
    top = z.amax(-1)
    x = z.sub_(top[:, None]) if overwrite else z - top[:, None]
    _divide_(x, temperature)
    x_y = x.gather(-1, ids).squeeze(-1)
    e = x.exp() if want_entropy else x.exp_()
    e.scatter_(-1, ids, 0.0)
    rest, own = e.sum(-1), x_y.exp()
    total = rest + own
    # where the token is the maximum, S = 1 + rest
    log_total = torch.where(x_y == 0, rest.log1p(), total.log())
    entropy = z.new_empty(0)
    if want_entropy:
        # a token of probability zero adds nothing to the entropy
        weighted = torch.linalg.vecdot(e, x.clamp_(min=LOWEST)) + own * x_y.clamp(min=LOWEST)
        entropy = log_total - weighted / total
    return RowStatistics(x_y - log_total, top, log_total, rest / total, entropy), e


def block_gradient_(
    e: Tensor,
    x: Tensor | None,
    token_ids: Tensor,
    s: RowStatistics,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    has_label: Tensor | None = None,
) -> Tensor:
    """dL/dz (n, V), but for the factor 1 / tau, written over e = exp(x).

    `grad` and `grad_entropy` (n,) are dL/d(log-prob) and dL/d(entropy), None for 0; `x` is only
    needed for the latter. `has_label` (n,): whether the token is one of these columns; None: yes.
    """
    total = s.log_total.exp()
    own = torch.zeros_like(total) if grad is None else grad * s.rest
    if grad_entropy is None:
        assert grad is not None
        e.mul_((-grad / total)[:, None])
    else:
        assert x is not None
        # p_v (log p_v + H) -> 0 as p_v -> 0, where log p_v = -inf
        weight = (x - (s.log_total - s.entropy)[:, None]).clamp_(min=LOWEST)
        weight.mul_(-grad_entropy[:, None])
        if grad is not None:
            weight.sub_(grad[:, None])
        e.mul_(weight).div_(total[:, None])
        p_y = s.logps.exp()
        own -= grad_entropy * p_y * (s.logps.clamp(min=LOWEST) + s.entropy)
    if has_label is not None:  # the others keep what they have in the column that stands for it
        own = torch.where(has_label, own, e.gather(-1, token_ids[:, None]).squeeze(-1))
    return e.scatter_(-1, token_ids[:, None], own[:, None])


def row_blocks(num_rows: int, vocab_size: int) -> Iterator[slice]:
    """Slices of rows whose fp32 copy takes at most `BLOCK_BYTES` (at least one row)."""
    size = max(1, BLOCK_BYTES // (4 * max(vocab_size, 1)))
    for start in range(0, num_rows, size):
        yield slice(start, start + size)


def _matrices(logits: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(number of the first row, rows (n, V)): views of logits (..., V), whatever its strides."""
    if logits.numel() == 0:
        return
    if logits.ndim <= 2:
        yield 0, logits.reshape(-1, logits.shape[-1])
        return
    size = logits[0].numel() // max(logits.shape[-1], 1)
    for i, part in enumerate(logits):
        for start, rows in _matrices(part):
            yield i * size + start, rows


def _divide_(x: Tensor, temperature: float) -> Tensor:
    return x if temperature == 1.0 else x.div_(temperature)
