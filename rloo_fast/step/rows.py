"""Rows of a generation batch from all processes, in the order in which they were sampled."""

from __future__ import annotations

from dataclasses import fields

import torch
from accelerate import Accelerator
from torch import Tensor

from ..distributed.collectives import gather_rows
from ..records import PreparedBatch, RolloutRows
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
    `tokens`, `score`, `advantage`, `old_entropy` where a pass before the update found it, and the
    columns of the sampler check.

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
    everyone = gather_rows(accelerator, columns | check.columns(batch))
    order = everyone.pop("row").argsort()[:num_real]
    return {name: column[order] for name, column in everyone.items()}
