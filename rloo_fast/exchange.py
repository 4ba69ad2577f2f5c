"""Rows between processes: whole groups, equally many on each, of about equal cost."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from .packing import balance, group_cost
from .types import Samples

PER_ROW = ("prompt_ids", "completion_ids", "groups")  # lists; beside them: num_tokens, TENSORS
TENSORS = ("scores", "stats", "sampler_logps")


def balance_rows(
    samples: Samples, accelerator: Accelerator, *, layout: str, tokens_per_pair: float
) -> Samples:
    """Samples with as many groups as before on every process, so chosen that all have about as
    much to compute; as they are with one process, or with groups that are not whole."""
    if accelerator.num_processes == 1 or not samples.whole_groups:
        return samples
    mine: dict[str, Any] = {name: getattr(samples, name) for name in PER_ROW}
    mine["num_tokens"] = samples.num_tokens
    mine |= {name: getattr(samples, name) for name in TENSORS}
    everyone: list[dict[str, Any]] = gather_object([mine])
    rows = {name: [x for one in everyone for x in one[name]] for name in PER_ROW}
    num_tokens = [n for one in everyone for n in one["num_tokens"]]
    k = samples.num_generations
    costs = [
        group_cost(
            len(rows["prompt_ids"][start]),
            num_tokens[start : start + k],
            layout,
            tokens_per_pair=tokens_per_pair,
        )
        for start in range(0, len(num_tokens), k)
    ]
    chosen = balance(costs, accelerator.num_processes)[accelerator.process_index]
    take = [row for group in chosen for row in range(group * k, (group + 1) * k)]
    sampler_logps = None
    if samples.sampler_logps is not None:
        packed = torch.cat([one["sampler_logps"] for one in everyone]).split(num_tokens)
        sampler_logps = torch.cat([packed[row] for row in take])
    taken: dict[str, Any] = {name: [rows[name][row] for row in take] for name in PER_ROW}
    return Samples(
        **taken,
        cu_seqlens=torch.tensor([0, *accumulate(num_tokens[row] for row in take)]),
        scores=torch.cat([one["scores"] for one in everyone])[take],
        stats={
            name: torch.cat([one["stats"][name] for one in everyone])[take]
            for name in samples.stats
        },
        num_generations=k,
        whole_groups=True,
        sampler_logps=sampler_logps,
    )
