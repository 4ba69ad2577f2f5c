"""Generation batches that tests make up."""

from __future__ import annotations

import random
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


def tree_batch(seed: int, *, num_groups: int = 4, k: int = 3, vocab: int = 32, depth: int = 6):
    """Groups whose prompts begin like other groups' rows, or are one of them whole, and whose
    completions begin like each other: branches behind branches, `depth` at most, rows that end in
    another one, equal rows, rows that are masked."""
    rng = random.Random(seed)
    grown: list[tuple[list[int], int]] = [([], 0)]  # token ids, and branches on their path

    def grow(of: list[tuple[list[int], int]], at_least: int, fresh: int) -> tuple[list[int], int]:
        ids, level = rng.choice(of)
        cut = rng.choice([len(ids), rng.randint(at_least, len(ids))])
        return ids[:cut] + [rng.randint(2, vocab - 1) for _ in range(fresh)], level + 1

    prompts, completions, counted = [], [], []
    for _ in range(num_groups):
        prompt, level = grow(
            [x for x in grown if len(x[0]) < 28 and x[1] < depth - 1], 0, rng.randint(1, 9)
        )
        rows = [(prompt, level)]
        for _ in range(k):
            row, below = grow([x for x in rows if x[1] < depth], len(prompt), rng.randint(0, 9))
            rows.append((row, below))
            prompts.append(prompt)
            completions.append(row[len(prompt) :])
            counted.append(len(completions[-1]) if rng.random() < 0.9 else 0)
        grown += rows
    return generation_batch(prompts, completions, num_generations=k, num_tokens=counted)


def trajectory_batch(seed: int, *, num_groups: int = 3, k: int = 3, vocab: int = 32):
    """Groups of trajectories: turns that were sampled between tokens that were not, in one strand
    or in several, of which a later one begins like an earlier one; a row that is masked."""
    rng = random.Random(seed)
    draw = lambda n: [rng.randint(2, vocab - 1) for _ in range(n)]  # noqa: E731
    prompts, strands, counted = [], [], []
    for _ in range(num_groups):
        prompt = draw(rng.randint(1, 6))
        for _ in range(k):
            prompts.append(prompt)
            strands.append([])
            counted.append([])
            for _ in range(rng.choice([1, 1, 2, 3])):
                before = strands[-1][-1] if strands[-1] else []
                ids = before[: rng.randint(0, len(before))] + draw(rng.randint(0, 2))
                places: list[int] = []
                for _ in range(rng.randint(1, 3)):
                    turn = draw(rng.randint(1, 4))
                    places += range(len(ids), len(ids) + len(turn))
                    ids = ids + turn + draw(rng.randint(0, 4))  # what a tool gave
                strands[-1].append(ids)
                counted[-1].append(places if rng.random() < 0.9 else [])
    counted[0] = [[] for _ in counted[0]]
    return generation_batch(
        prompts,
        [of_row[-1] for of_row in strands],
        num_generations=k,
        num_tokens=[sum(map(len, of_row)) for of_row in counted],
        strand_ids=strands,
        counted=counted,
    )
