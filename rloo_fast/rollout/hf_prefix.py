"""Prompts that begin alike run through a model once: prefill by the levels of their tree.

    level 0   what some prompts begin with      system prompt, tools
    level 1   what of these still share         a question
    ...
    the last  what each has for itself          turns of a conversation

A level is one forward: its segments are padded on the left, behind a copy of their parents' keys
and values. A prompt then has padding between its segments, which is masked as that before it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batching.prefix_tree import Branch, branches, key_of, shared

SHORTEST = 16  # tokens of a segment that is worth a forward of its own
MOST_LEVELS = 4
WORTH = 0.75  # run at most this share of the tokens, or each prompt runs for itself


class Level(NamedTuple):
    """Segments that run at the same time, each behind a segment of the level before."""

    parents: list[int]  # their numbers there
    segments: list[list[int]]  # empty: of prompts that share less
    firsts: list[int]  # the first token of what they are a part of

    @property
    def num_tokens(self) -> int:
        return len(self.segments) * max(len(ids) for ids in self.segments)


def prefix_levels(prompts: Sequence[list[int]]) -> list[Level] | None:
    """The levels of different prompts, in whose last one is a segment for each, in order; None
    where that spares too little."""
    if len(prompts) < 2:
        return None
    shares = _shares(prompts)
    most = max(map(len, shares))
    cuts = [
        [0, *some, *[max(some, default=0)] * (most - len(some)), len(prompt)]
        for some, prompt in zip(shares, prompts, strict=True)
    ]
    levels: list[Level] = []
    above = [0] * len(prompts)  # the number of each prompt's segment in the level before
    for depth in range(most + 1):
        level = Level([], [], [])
        numbers: dict[tuple[int, ...], int] = {}
        for row, prompt in enumerate(prompts):
            segment = prompt[cuts[row][depth] : cuts[row][depth + 1]]
            key = (above[row], row) if depth == most else (above[row], -1, *segment)
            if key not in numbers:
                numbers[key] = len(numbers)
                level.parents.append(above[row])
                level.segments.append(segment)
                level.firsts.append(prompt[0])
            above[row] = numbers[key]
        levels.append(level)
    plain = len(prompts) * max(map(len, prompts))
    return levels if sum(level.num_tokens for level in levels) <= WORTH * plain else None


def _shares(prompts: Sequence[list[int]]) -> list[list[int]]:
    """How many first tokens each prompt shares with others: ever more, with ever fewer."""
    found: list[list[int]] = [[] for _ in prompts]
    tree = branches(shared([key_of(ids) for ids in prompts], ends=False))
    left: list[tuple[Branch | int, list[int]]] = [(tree[-1], [])]
    while left:
        node, cuts = left.pop()
        if not isinstance(node, Branch):
            found[node] = cuts
            continue
        far = node.depth - (cuts[-1] if cuts else 0) >= SHORTEST
        if far and len(cuts) + 1 < MOST_LEVELS:
            cuts = [*cuts, node.depth]
        left += [(child, cuts) for child in node.children]
    return found


class Prefilled(NamedTuple):
    """A KV cache of all but the last token of prompts, and these, padded: (P, W) each."""

    cache: Any
    ids: Tensor
    mask: Tensor


def prefill_levels(
    levels: Sequence[Level],
    prefill: Callable[[Tensor, Tensor, Any], Any],
    device: torch.device,
) -> Prefilled | None:
    """`prefill(ids, mask, cache)`: the cache with the tokens that it lacks, or None if it cannot be
    used so."""
    cache, ids = None, torch.empty((1, 0), dtype=torch.long)
    mask, ends = ids, ids
    for number, level in enumerate(levels):
        segments = level.segments
        if number == len(levels) - 1:
            ends = torch.tensor([segment[-1:] for segment in segments])
            segments = [segment[:-1] for segment in segments]
        rows = torch.tensor(level.parents)
        width = max(map(len, segments))
        # a repetition penalty counts padding too: a token of the prompt adds nothing to it
        own = [
            [first] * (width - len(segment)) + segment
            for first, segment in zip(level.firsts, segments, strict=True)
        ]
        seen = [[0] * (width - len(s)) + [1] * len(s) for s in segments]
        ids = torch.cat([ids[rows], torch.tensor(own, dtype=torch.long)], 1)
        mask = torch.cat([mask[rows], torch.tensor(seen, dtype=torch.long)], 1)
        if cache is not None:
            cache.batch_select_indices(rows.to(device))
        if width:
            cache = prefill(ids.to(device), mask.to(device), cache)
            if cache is None:
                return None
    mask = torch.cat([mask, torch.ones_like(ends)], 1)
    return Prefilled(cache, torch.cat([ids, ends], 1).to(device), mask.to(device))
