"""Rows between processes: whole groups, equally many on each, of about equal cost."""

# accelerate has no stubs
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import torch
from accelerate import Accelerator

from ..distributed.collectives import gather_objects, gather_tensor
from ..record_rows import concatenate, take_rows
from ..records import BatchSizes, GenerationBatch
from .layouts import Layout
from .packing import balance, completions_of
from .planner import Planner
from .prefix_tree import branches
from .strands import row_tokens, sharing_of
from .tree_balance import balance_tree


def balance_rows(
    batch: GenerationBatch, accelerator: Accelerator, *, layout: Layout, tokens_per_pair: float
) -> GenerationBatch:
    """As many groups as before on every process, so chosen that all have about as much to
    compute; unchanged with one process, or with groups that are not whole."""
    if accelerator.num_processes == 1 or not batch.whole_groups:
        return batch
    everyone: GenerationBatch = concatenate(gather_objects(accelerator, batch))
    k = batch.num_generations
    ranks = _spread(everyone, accelerator.num_processes, layout, tokens_per_pair)
    chosen = ranks[accelerator.process_index]
    return take_rows(everyone, [row for group in chosen for row in range(group * k, group * k + k)])


def _spread(
    batch: GenerationBatch, num_ranks: int, layout: Layout, tokens_per_pair: float
) -> list[list[int]]:
    """Group numbers of each rank."""
    k = batch.num_generations
    starts = range(0, batch.num_rows, k)
    prompts = [batch.prompt_ids[start] for start in starts]
    tokens = row_tokens(batch, layout)
    counted = [
        [*chain.from_iterable(map(completions_of, tokens[start : start + k]))] for start in starts
    ]
    costs = [
        layout.cost(len(prompt), lengths, tokens_per_pair=tokens_per_pair)
        for prompt, lengths in zip(prompts, counted, strict=True)
    ]
    sharing = sharing_of(batch, [[*range(start, start + k)] for start in starts], layout)
    if sharing is None:
        return balance(costs, num_ranks)

    def cost_of(tokens: int) -> float:
        return layout.cost(tokens, [], tokens_per_pair=tokens_per_pair)

    own: list[float] = []
    for group, (cost, prompt, lengths) in enumerate(zip(costs, prompts, counted, strict=True)):
        tokens = sharing.group_tokens(group, len(prompt), lengths)
        saved = layout.tokens(len(prompt), lengths) - tokens
        own.append(cost - saved - cost_of(sharing.joins[group]))
    return balance_tree(own, branches(sharing.groups), cost_of, num_ranks)


def with_sizes(
    batch: GenerationBatch, planner: Planner, accelerator: Accelerator
) -> GenerationBatch:
    """The batch with its sizes over all processes, which budgets and a denominator depend on."""
    mine = [*planner.sizes_here(batch), sum(batch.num_tokens)]
    everyone = gather_tensor(accelerator, torch.tensor([mine]))
    longest, largest = (int(x) for x in everyone[:, :2].max(0).values)
    mean_tokens = everyone[:, 2].double().mean().item()
    return replace(batch, sizes=BatchSizes(longest, largest, mean_tokens))
