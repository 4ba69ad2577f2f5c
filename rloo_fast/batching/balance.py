"""Rows between processes: whole groups, equally many on each, of about equal cost."""

# accelerate has no stubs
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

from dataclasses import replace

import torch
from accelerate import Accelerator

from ..distributed.collectives import gather_objects, gather_tensor
from ..record_rows import concatenate, take_rows
from ..records import BatchSizes, GenerationBatch
from .layouts import Layout
from .packing import balance
from .planner import Planner


def balance_rows(
    batch: GenerationBatch, accelerator: Accelerator, *, layout: Layout, tokens_per_pair: float
) -> GenerationBatch:
    """As many groups as before on every process, so chosen that all have about as much to
    compute; unchanged with one process, or with groups that are not whole."""
    if accelerator.num_processes == 1 or not batch.whole_groups:
        return batch
    everyone: GenerationBatch = concatenate(gather_objects(accelerator, batch))
    k = batch.num_generations
    costs = [
        layout.cost(
            len(everyone.prompt_ids[start]),
            everyone.num_tokens[start : start + k],
            tokens_per_pair=tokens_per_pair,
        )
        for start in range(0, everyone.num_rows, k)
    ]
    chosen = balance(costs, accelerator.num_processes)[accelerator.process_index]
    return take_rows(everyone, [row for group in chosen for row in range(group * k, group * k + k)])


def with_sizes(
    batch: GenerationBatch, planner: Planner, accelerator: Accelerator
) -> GenerationBatch:
    """The batch with its sizes over all processes, which budgets and a denominator depend on."""
    mine = [*planner.sizes_here(batch), sum(batch.num_tokens)]
    everyone = gather_tensor(accelerator, torch.tensor([mine]))
    longest, largest = (int(x) for x in everyone[:, :2].max(0).values)
    mean_tokens = everyone[:, 2].double().mean().item()
    return replace(batch, sizes=BatchSizes(longest, largest, mean_tokens))
