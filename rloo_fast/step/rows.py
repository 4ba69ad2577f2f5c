"""Rows of a generation batch from all processes, in the order in which they were sampled."""

from __future__ import annotations

from dataclasses import fields

import torch
from accelerate import Accelerator
from rloo_kernels.loss.packed import segment_ids, segment_sum
from torch import Tensor

from ..distributed.collectives import gather_rows
from ..records import GenerationBatch, PreparedBatch, RolloutRows
from ..weight_sync.sampler_check import SamplerCheck


def rollout_rows(
    batch: PreparedBatch,
    check: SamplerCheck,
    accelerator: Accelerator,
    *,
    advantages_per_token: bool,
    num_real: int | None = None,
) -> dict[str, Tensor]:
    """Column -> (R x processes,): RolloutRows (rewards as reward_0, reward_1, ...), PolicyRows,
    `tokens`, `score`, `advantage`, `old_entropy` where a pass before the update found it, those of
    staleness and of the sampler check.

    One collective; all processes have as many rows. `num_real`: rows that are not repeats.
    """
    generation, advantages = batch.generation, batch.advantages
    assert advantages is not None
    assert batch.policy_rows is not None
    if advantages_per_token:  # that of the first token is the sequence's own
        starts = generation.cu_seqlens[:-1].clamp(max=max(len(advantages) - 1, 0))
        empty = advantages.new_zeros(generation.num_rows)
        advantages = advantages[starts] if len(advantages) else empty
    columns = {
        f.name: getattr(generation.rows, f.name) for f in fields(RolloutRows) if f.name != "rewards"
    }
    rewards = generation.rows.rewards
    columns |= {f"reward_{i}": rewards[:, i] for i in range(rewards.shape[1])}
    columns |= vars(batch.policy_rows)
    columns |= {
        "tokens": torch.tensor(generation.num_tokens),
        "score": generation.scores,
        "advantage": advantages,
    }
    if batch.old_entropy is not None:
        columns["old_entropy"] = batch.old_entropy
    columns |= _staleness_columns(generation)
    everyone = gather_rows(accelerator, columns | check.columns(batch))
    order = everyone.pop("row").argsort()[:num_real]
    return {name: column[order] for name, column in everyone.items()}


def _staleness_columns(generation: GenerationBatch) -> dict[str, Tensor]:
    """Per row, what `metrics.staleness_metrics` needs."""
    lag, cu_seqlens = generation.staleness, generation.cu_seqlens
    owner = segment_ids(cu_seqlens, len(lag))
    begins = torch.ones_like(lag)  # 1: the token before it in the row is of another version
    begins[1:] = ((lag.diff() != 0) | (owner.diff() != 0)).long()
    return {
        "staleness_sum": segment_sum(lag, cu_seqlens),
        "staleness_max": lag.new_zeros(generation.num_rows).scatter_reduce(0, owner, lag, "amax"),
        "stale_tokens": segment_sum((lag != 0).long(), cu_seqlens),
        "num_versions": segment_sum(begins, cu_seqlens),
    }
