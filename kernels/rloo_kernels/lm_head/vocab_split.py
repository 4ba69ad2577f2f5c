"""A head whose vocabulary is split over processes, as the ops call it: checks, labels, pieces.

`vocab_shards.py` has the mathematics and the collectives.
"""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..dispatch import use_triton
from ..logprob.types import RowStatistics
from .types import LMHead, LogitGradient
from .vocab_shards import SplitLabels, VocabSplit
from .vocab_shards_torch import label_logits_torch, split_piece_torch

if TYPE_CHECKING:  # a torch without distributed has none
    from torch.distributed import ProcessGroup


class SplitArguments(NamedTuple):
    """What the ops of torch.library are told about a split; group None: there is none."""

    group: str | None
    shard: list[int]  # [offset, V, whether dX is summed]
    rows_per_rank: int  # V / R, rounded up


def split_arguments(
    weight: Tensor,
    group: ProcessGroup | str | None,
    vocab_offset: int,
    vocab_size: int | None,
    sum_hidden_grad: bool,
) -> SplitArguments:
    """Arguments of a public op, for weight (V_r, D).

    Raises ValueError for rows that lie outside the vocabulary, uneven ones without a vocab_size,
    and an offset or a vocab_size without a group.
    """
    own = weight.shape[0]
    group = _resolve(group) if isinstance(group, str) else group
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    if vocab_size is None:
        vocab_size = own * ranks
        if vocab_offset != rank * own:
            raise ValueError(
                f"vocab_offset is {vocab_offset}, where with {own} rows on each rank, rank {rank} "
                f"has those from {rank * own} on: with unequal numbers of rows, say vocab_size."
            )
    if own == 0 or vocab_offset < 0 or vocab_offset + own > vocab_size:
        raise ValueError(
            f"weight has the rows {vocab_offset} to {vocab_offset + own} of a vocabulary of "
            f"{vocab_size}: it needs at least one, and none beyond."
        )
    if ranks == 1:
        if own != vocab_size:
            raise ValueError(
                f"weight has {own} of {vocab_size} rows of the vocabulary, and no other process "
                "has the rest: pass group=, the process group over which it is split."
            )
        return SplitArguments(None, [], own)
    assert group is not None
    shard = [vocab_offset, vocab_size, int(sum_hidden_grad)]
    return SplitArguments(group.group_name, shard, -(-vocab_size // ranks))


def open_split(group: str | None, shard: list[int]) -> VocabSplit | None:
    """The split that `SplitArguments` describe."""
    if group is None:
        return None
    offset, vocab_size, sum_hidden_grad = shard
    return VocabSplit(_resolve(group), offset, vocab_size, bool(sum_hidden_grad))


def _resolve(name: str) -> ProcessGroup:
    """The group of this name: what the ops of torch pass on in place of a group."""
    from torch.distributed import distributed_c10d

    # no public name has it; torch's own functional collectives take names by it
    return cast(Any, distributed_c10d)._resolve_process_group(name)


def label_logits(hidden: Tensor, head: LMHead, columns: Tensor) -> Tensor:
    """z_y (n,) of hidden (n, D), in the units of `ShardSums.top`; anything where a column is -1."""
    if use_triton(hidden):
        from .vocab_shards_triton import label_logits_triton

        return label_logits_triton(hidden, head, columns)
    return label_logits_torch(hidden, head, columns)


def split_labels(hidden: Tensor, head: LMHead, token_ids: Tensor, split: VocabSplit) -> SplitLabels:
    """The tokens (n,) of hidden (n, D), each with the logit that the rank that has it makes of it.

    One all-reduce. Raises ValueError on every rank if the ranks' rows do not make up the
    vocabulary; on a GPU, where looking would wait for the device, all logits are nan.
    """
    own = head.weight.shape[0]
    columns = token_ids - split.offset
    here = (columns >= 0) & (columns < own)
    columns = torch.where(here, columns, -1)
    logits = label_logits(hidden, head, columns).masked_fill(~here, 0.0)
    edges = _mixed(split.offset + own) - _mixed(split.offset)
    found = torch.cat([logits, here.to(logits.dtype), logits.new_full((1,), edges)])
    dist.all_reduce(found, group=split.group)
    logits, owners = found[:-1].chunk(2)
    # from 0 to V each inner edge ends one rank's rows and begins another's
    complete = found[-1] == _mixed(split.vocab_size) - _mixed(0)
    right = (owners == 1) & complete
    if hidden.device.type == "cpu" and not bool(right.all() & complete):
        raise ValueError(
            f"The ranks must hold the {split.vocab_size} rows of the vocabulary, each one once; "
            f"this one holds those from {split.offset} to {split.offset + own}, and of "
            f"{len(owners)} tokens {int((owners != 1).sum())} are on no rank or on several. "
            "Check vocab_offset and vocab_size of every rank."
        )
    return SplitLabels(split, columns, logits.masked_fill(~right, torch.nan))


def _mixed(row: int) -> int:
    """A number below 2^16 for a row: sums of some are exact in fp32, and seldom the same."""
    return row * (row + 40503) % 65521


def split_piece(
    hidden: Tensor,
    head: LMHead,
    labels: SplitLabels,
    want_entropy: bool,
    want_gradient: bool,
    upstream: tuple[Tensor, Tensor] | None,
) -> tuple[RowStatistics, LogitGradient | None]:
    """`forward_piece`: statistics over all ranks' columns, M of this rank's. One all-gather."""
    piece = split_piece_torch
    if use_triton(hidden):
        from .vocab_shards_triton import split_piece_triton

        piece = split_piece_triton
    return piece(hidden, head, labels, want_entropy, want_gradient, upstream)
