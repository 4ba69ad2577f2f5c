"""Generation batches that tests make up."""

from __future__ import annotations

from typing import Any

import torch

from rloo_fast.records import GenerationBatch, PreparedBatch, RolloutRows


def generation_batch(
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    *,
    num_generations: int = 2,
    num_tokens: list[int] | None = None,
    groups: list[int] | None = None,
    **fields: Any,
) -> GenerationBatch:
    """A batch of these rows: all tokens count, groups of num_generations rows, scores 0."""
    num_rows = len(completion_ids)
    zeros = torch.zeros(num_rows)
    lengths = torch.tensor([len(ids) for ids in completion_ids])
    rows = RolloutRows(
        row=torch.arange(num_rows),
        length=lengths,
        truncated=zeros.bool(),
        rewards=zeros[:, None],
        reward=zeros,
    )
    return GenerationBatch(
        **{
            "prompt_ids": prompt_ids,
            "completion_ids": completion_ids,
            "num_tokens": lengths.tolist() if num_tokens is None else num_tokens,
            "groups": [row // num_generations for row in range(num_rows)]
            if groups is None
            else groups,
            "scores": zeros,
            "rows": rows,
            "num_generations": num_generations,
            **fields,
        }
    )


def prepared_batch(*args: Any, prepared: dict[str, Any] | None = None, **kwargs: Any):
    """The same as a PreparedBatch; `prepared`: its own fields."""
    return PreparedBatch(generation_batch(*args, **kwargs), **(prepared or {}))
