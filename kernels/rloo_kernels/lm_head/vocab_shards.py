"""An lm_head whose V rows lie on the R ranks of a process group; all have the same hidden states.

Each rank makes the statistics of its own columns *and the token*, as if there were no others, with
an anchor a_r of its own (a maximum, or the token's logit), and the ranks share them:

    S_r = sum over v of rank r, v != y, of exp((z_v - a_r) / tau)          A = max_r a_r
    S = exp((z_y - A) / tau) + sum_r exp((a_r - A) / tau) S_r
    log p(y) = (z_y - A) / tau - log S

Collectives of one call, N rows:

    once         all-reduce (SUM) of 2 N + 1 floats: z_y, which one rank has, and who has it
    per piece    all-gather of 2 floats per row of it (a_r, S_r), 3 with the entropy
    once         all-reduce (SUM) of dX, N D numbers in the hidden states' dtype; dW, db are local

A sum relative to z_y could be added up in place of being gathered, but it overflows where the token
is all but impossible, and the ranks would have to look at it together before they went on. Gathered
with its anchor it never does: nothing is decided by a value, no host waits for a device, and all
ranks add up the same numbers in the same order, to the same bits.
"""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..logprob.rows_torch import LOWEST
from ..logprob.types import RowStatistics

if TYPE_CHECKING:  # a torch without distributed has none
    from torch.distributed import ProcessGroup

LEAST = -1e30  # as good as -inf beside any logit that is not


@dataclass(frozen=True)
class VocabSplit:
    """Where this rank's rows of W lie in the vocabulary."""

    group: ProcessGroup
    offset: int  # of the first one
    vocab_size: int  # V, of all ranks together
    sum_hidden_grad: bool  # whether dX is summed over the ranks

    @property
    def rows_per_rank(self) -> int:
        """V / R, rounded up."""
        return -(-self.vocab_size // dist.get_world_size(self.group))

    def sum_hidden(self, grad: Tensor) -> Tensor:
        """dX (N, D) of all ranks, written over that of this one's columns."""
        if self.sum_hidden_grad:
            dist.all_reduce(grad, group=self.group)
        return grad


@dataclass(frozen=True)
class SplitLabels:
    """The tokens of n rows for a head that is split, in place of their ids."""

    split: VocabSplit
    columns: Tensor  # (n,) int64: the token's row of this rank's W, -1 where another rank has it
    logits: Tensor  # (n,) z_y, in the units of `ShardSums.top`

    @property
    def anchors(self) -> Tensor:
        """z_y (n,), finite where the token is impossible: x - anchor is never -inf - -inf."""
        return self.logits.clamp(min=LEAST)

    def __len__(self) -> int:
        return len(self.columns)

    def __getitem__(self, rows: slice | Tensor) -> SplitLabels:
        return SplitLabels(self.split, self.columns[rows], self.logits[rows])


Labels = Tensor | SplitLabels  # ids (n,), or with a split vocabulary what stands for them


class ShardSums(NamedTuple):
    """One rank's columns of the softmax of n rows, the token's own term left out; each (n,)."""

    top: Tensor  # a_r
    others: Tensor  # S_r
    spread: Tensor | None  # sum of exp(x_v) x_v over v != y, x_v = (z_v - a_r) / tau


def all_shards(found: ShardSums, labels: SplitLabels, per_unit: float) -> RowStatistics:
    """The softmax over all ranks' columns: one all-gather. x = (z - top) per_unit."""
    mine = torch.stack([x for x in found if x is not None])
    group = labels.split.group
    every = mine.new_empty(dist.get_world_size(group), *mine.shape)
    dist.all_gather(list(every.unbind(0)), mine, group=group)
    tops, sums = every[:, 0], every[:, 1]
    top = tops.amax(0)
    shift = (tops - top) * per_unit
    factor = shift.exp()
    others = (factor * sums).sum(0)
    x_y = (labels.logits - top) * per_unit
    own = x_y.exp()
    total = others + own
    log_total = torch.where(x_y == 0, others.log1p(), total.log())
    entropy = others.new_empty(0)
    if found.spread is not None:
        # a token, or a rank, of probability zero adds nothing: 0 times -inf would be nan
        spread = (factor * (every[:, 2] + shift.clamp(min=LOWEST) * sums)).sum(0)
        entropy = log_total - (spread + own * x_y.clamp(min=LOWEST)) / total
    return RowStatistics(x_y - log_total, top, log_total, others / total, entropy)
