"""A rank's columns of a piece whose vocabulary is split: the specification (`vocab_shards.py`).

As `piece_torch.py`, whose letters these are, but that the statistics come from all ranks: the raw
logits of this rank wait for them, and turn into M in a second pass over the piece.
"""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import torch
from torch import Tensor

from ..logprob.rows_torch import LOWEST, block_gradient_, row_blocks
from ..logprob.types import RowStatistics, accumulation_dtype
from .types import LMHead, LogitGradient
from .vocab_shards import ShardSums, SplitLabels, all_shards


def label_logits_torch(hidden: Tensor, head: LMHead, columns: Tensor) -> Tensor:
    """z_y (n,) of hidden (n, D) in fp32, tau left out; 0 where the column is -1."""
    logits = hidden.new_zeros(len(columns), dtype=accumulation_dtype(hidden.dtype))
    here = (columns >= 0).nonzero().squeeze(1)
    for block in row_blocks(len(here), hidden.shape[1]):
        rows = here[block]
        of_rows = columns[rows]
        h, w = (x.to(logits.dtype) for x in (hidden[rows], head.weight[of_rows]))
        raw = (h * w).sum(-1)
        if head.bias is not None:
            raw += head.bias[of_rows]
        logits[rows] = head.transform(raw)[0]
    return logits


def split_piece_torch(
    hidden: Tensor,
    head: LMHead,
    labels: SplitLabels,
    want_entropy: bool,
    want_gradient: bool,
    upstream: tuple[Tensor, Tensor] | None,
) -> tuple[RowStatistics, LogitGradient | None]:
    """Statistics over all ranks' columns, and with `want_gradient` M of this rank's."""
    raw = torch.nn.functional.linear(hidden, head.weight, head.bias)
    want_entropy = want_entropy or upstream is not None
    mine = _sums(raw, head, labels, want_entropy)
    statistics = all_shards(mine, labels, 1.0 / head.temperature)
    if not want_gradient:
        return statistics, None
    for rows in row_blocks(*raw.shape):
        z, slope = head.transform(raw[rows].to(statistics.top.dtype))
        here = RowStatistics(*(c[rows] if c.numel() else c for c in statistics))
        columns = labels.columns[rows]
        x = z.sub_(here.top[:, None]).div_(head.temperature)
        grad, grad_entropy = torch.ones_like(here.top), None
        if upstream is not None:
            grad, grad_entropy = (u[rows] for u in upstream)
        ids, mine = columns.clamp(min=0), columns >= 0
        d = block_gradient_(x.exp(), x, ids, here, grad, grad_entropy, mine)
        if slope is not None:
            d.mul_(slope)
        if head.slope != 1.0:
            d.mul_(head.slope)
        raw[rows] = d
    # as `forward_piece_torch`, whose M has a scale per row
    return statistics, LogitGradient(raw, torch.ones_like(statistics.top))


def _sums(raw: Tensor, head: LMHead, labels: SplitLabels, want_entropy: bool) -> ShardSums:
    """Of raw logits (n, V_r); the anchor is the maximum of the columns and the token."""
    anchors = labels.anchors
    top, others, spread = (torch.empty_like(anchors) for _ in range(3))
    for rows in row_blocks(*raw.shape):
        z, _ = head.transform(raw[rows].to(top.dtype))
        top[rows] = torch.maximum(z.amax(-1), anchors[rows])
        x = (z - top[rows, None]).div_(head.temperature)  # of fp32, z is raw itself
        columns = labels.columns[rows]
        has_label = (columns >= 0).nonzero().squeeze(1)
        e = x.exp()
        e[has_label, columns[has_label]] = 0.0
        others[rows] = e.sum(-1)
        if want_entropy:
            spread[rows] = torch.linalg.vecdot(e, x.clamp_(min=LOWEST))
    return ShardSums(top, others, spread if want_entropy else None)
