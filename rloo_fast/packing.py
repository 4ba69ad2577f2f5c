"""Stage 4: groups -> token-budget micro-batches, balanced over ranks. Pure Python, deterministic.

P prompt tokens, L completion tokens of a row. A unit is a list of rows of one group: they share
the prompt, and in the shared-prefix layout it is run once for all of them. A micro-batch is a
list of units.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

LAYOUTS = ("shared_prefix", "packed", "padded")

Unit = list[int]  # row numbers, ascending


def unit_tokens(prompt: int, completions: Sequence[int], layout: str) -> int:
    """Tokens the model runs for some completions of one prompt.

    shared_prefix: P + sum L;  packed: sum (P + L);  padded: rows * max (P + L).
    """
    assert layout in LAYOUTS, layout
    if layout == "shared_prefix":
        return prompt + sum(completions)
    if layout == "packed":
        return prompt * len(completions) + sum(completions)
    return len(completions) * (prompt + max(completions))


def batch_tokens(
    batch: Sequence[Unit],
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[int],
    layout: str,
) -> int:
    """Tokens the model runs for a micro-batch; 0 for a filler. Padded: all rows to the longest."""
    units = [_lengths(unit, prompt_lengths, completion_lengths) for unit in batch]
    if layout == "padded":
        num_rows = sum(len(completions) for _, completions in units)
        return num_rows * max((prompt + max(ls) for prompt, ls in units), default=0)
    return sum(unit_tokens(prompt, completions, layout) for prompt, completions in units)


def largest_group_tokens(
    groups: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[int],
    layout: str,
) -> int:
    """Tokens of the largest whole group, 0 without groups: all fit if it is <= the budget."""
    lengths = (_lengths(rows, prompt_lengths, completion_lengths) for rows in groups if rows)
    return max((unit_tokens(*pair, layout) for pair in lengths), default=0)


def rounded_tokens(tokens: int, budget: int) -> int:
    """Token count a compiled model is run at: the smallest of a few sizes that is >= tokens.

    base: the budget rounded up to {4, 5, 6, 7} * 2^e, e >= 6, so that base / 4 is a multiple of
    16. Sizes: base/4, base/2, 3 base/4, base; for an over-size unit multiples of base/2 beyond.

    Waste: less than base/4 up to base (a filler, 0 tokens: base/4), less than base/2 beyond.
    base < 5/4 * budget from 256 up, and = budget for 256, 320, 384, 448, 512, 640, 768, 896, ...
    """
    exponent = max(6, budget.bit_length() - 3)  # 4 * 2^e <= budget < 8 * 2^e from 256 up
    base = max(4, -(-budget // 2**exponent)) << exponent
    step = base // 4 if tokens <= base else base // 2
    return max(1, -(-tokens // step)) * step


class _Demand(NamedTuple):
    """What first-fit knows of a unit; the largest is put in first."""

    order: int  # tokens of a row when padded, of the unit otherwise
    size: int  # room it takes in a micro-batch
    room: int  # room of a micro-batch that it is the first in


def pack(
    groups: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[int],
    *,
    layout: str,
    budget: int,
    split: bool,
) -> list[list[Unit]]:
    """Micro-batches of at most `budget` tokens: first-fit of units, largest first.

    `groups`: row numbers of each group; the lengths are indexed by row number. Every row comes
    once. Micro-batches go from most tokens to fewest (out of memory shows early), their units too
    (padded: from the longest row down, as it fixes the width); ties by row number, so the order
    in which groups and their rows are given changes nothing.

    A group within the budget is a unit. With `split`, a larger one is cut by first-fit of its
    rows, longest first: few parts, filled in turn, because a small rest fits into some gap (of
    even parts just over half the budget no two share a micro-batch). A row over the budget is
    alone in its micro-batch; so is, without `split`, a group over it.
    """
    units: list[Unit] = []
    demands: list[_Demand] = []
    for rows in sorted(sorted(group) for group in groups if group):  # ties go by first row
        prompt, completions = _lengths(rows, prompt_lengths, completion_lengths)
        parts = [rows]
        if split and unit_tokens(prompt, completions, layout) > budget:
            parts = _cut(rows, prompt, completions, layout, budget)
        for part in parts:
            lengths = [completion_lengths[row] for row in part]
            units.append(part)
            demands.append(_demand(prompt, lengths, layout, budget))
    batches = _first_fit(units, demands)

    def largest_first(batch: list[Unit]) -> tuple[int, int]:
        return -batch_tokens(batch, prompt_lengths, completion_lengths, layout), batch[0][0]

    return sorted(batches, key=largest_first)


def _lengths(
    rows: Sequence[int], prompt_lengths: Sequence[int], completion_lengths: Sequence[int]
) -> tuple[int, list[int]]:
    """(P, [L of each row]) of rows of one group."""
    prompt = prompt_lengths[rows[0]]
    assert prompt > 0, (rows[0], prompt)
    assert all(prompt_lengths[row] == prompt for row in rows), ("prompts of a group differ", rows)
    return prompt, [completion_lengths[row] for row in rows]


def _demand(prompt: int, completions: Sequence[int], layout: str, budget: int) -> _Demand:
    if layout == "padded":  # the first unit has the longest row: it fixes the width, room is rows
        width = prompt + max(completions)
        return _Demand(width, len(completions), budget // width)
    tokens = unit_tokens(prompt, completions, layout)
    return _Demand(tokens, tokens, budget)


def _cut(
    rows: Unit, prompt: int, completions: Sequence[int], layout: str, budget: int
) -> list[Unit]:
    """Parts of a group that fit the budget, each row over it alone."""
    if layout == "shared_prefix":  # a part pays its prompt once: the rest is for completions
        demands = [_Demand(length, length, budget - prompt) for length in completions]
    else:
        demands = [_demand(prompt, [length], layout, budget) for length in completions]
    parts = _first_fit([[row] for row in rows], demands)
    return [sorted(row for (row,) in part) for part in parts]


def _first_fit(units: Sequence[Unit], demands: Sequence[_Demand]) -> list[list[Unit]]:
    """Each unit, largest first (equal ones as given), into the first bin with room, or a new one.

    O(n log n): a tree over the bins holds in every node the most room below it. An over-size
    unit leaves its bin with less than none, so nothing follows it.
    """
    leaves = 1 << max(0, len(units) - 1).bit_length()
    most_room = [-1] * (2 * leaves)  # node i has children 2i and 2i + 1; -1: no bin yet
    bins: list[list[Unit]] = []
    pairs = zip(units, demands, strict=True)
    for unit, (_, size, room) in sorted(pairs, key=itemgetter(1), reverse=True):
        if most_room[1] < size:
            node = leaves + len(bins)
            bins.append([])
        else:
            node = 1
            while node < leaves:
                node *= 2
                if most_room[node] < size:
                    node += 1
            room = most_room[node]
        bins[node - leaves].append(unit)
        most_room[node] = room - size
        while node > 1:
            node //= 2
            left, right = most_room[2 * node], most_room[2 * node + 1]
            most = left if left > right else right
            if most == most_room[node]:
                break
            most_room[node] = most
    return bins


def group_cost(
    prompt: int, completions: Sequence[int], layout: str, *, tokens_per_pair: float
) -> float:
    """Estimated cost, in tokens: tokens run + (query, key) pairs / tokens_per_pair.

    Pairs: shared_prefix: P^2/2 + sum (L P + L^2/2);  packed and padded: sum (P + L)^2/2.
    A decoder layer with the usual 12 D^2 weights does 24 D^2 FLOPs of matrix products per token,
    and attention 4 D per pair (2 D for q.k, 2 D for p v): tokens_per_pair = 24 D^2 / 4 D = 6 D.
    """
    if layout == "shared_prefix":
        pairs = prompt**2 / 2 + sum(length * prompt + length**2 / 2 for length in completions)
    else:
        pairs = sum((prompt + length) ** 2 / 2 for length in completions)
    return unit_tokens(prompt, completions, layout) + pairs / tokens_per_pair


def balance(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Item numbers of each rank, ascending: equally many on each, their costs nearly even.

    Largest first, to the rank with the least so far of those that are not full. Two ranks' sums
    differ by at most the largest cost: so they do while both have places; and counting from when
    they last held equally many, the i-th item of the one that fills up first came before the
    i-th of the other and is no smaller, so the other cannot gain on it.
    """
    assert len(costs) % num_ranks == 0, (len(costs), num_ranks)
    per_rank = len(costs) // num_ranks
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    open_ranks: list[tuple[float, int]] = [(0.0, rank) for rank in range(num_ranks)]  # a heap
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, rank = open_ranks[0]
        ranks[rank].append(item)
        if len(ranks[rank]) < per_rank:
            heapq.heapreplace(open_ranks, (total + costs[item], rank))
        else:
            heapq.heappop(open_ranks)
    return [sorted(items) for items in ranks]
