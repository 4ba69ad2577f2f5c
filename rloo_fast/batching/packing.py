"""Groups -> micro-batches within a budget of tokens, and over processes. Deterministic.

P prompt tokens, L completion tokens of a row. A unit is a list of rows of one group: they share
the prompt, and in the shared-prefix layout it is run once for all of them. A micro-batch is a
list of units.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from operator import itemgetter

from ..records import Unit
from .layouts.base import Demand, Layout, UnitLengths


def batch_tokens(
    batch: Sequence[Unit],
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[int],
    layout: Layout,
) -> int:
    """Tokens the model runs for a micro-batch; 0 for a filler."""
    return layout.batch_tokens(
        [_lengths(unit, prompt_lengths, completion_lengths) for unit in batch]
    )


def largest_group_tokens(
    groups: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[int],
    layout: Layout,
) -> int:
    """Tokens of the largest whole group, 0 without groups: all fit if it is <= the budget."""
    lengths = (_lengths(rows, prompt_lengths, completion_lengths) for rows in groups if rows)
    return max((layout.tokens(*unit) for unit in lengths), default=0)


def pack(
    groups: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[int],
    *,
    layout: Layout,
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
    demands: list[Demand] = []
    for rows in sorted(sorted(group) for group in groups if group):  # ties go by first row
        prompt, completions = _lengths(rows, prompt_lengths, completion_lengths)
        parts = [rows]
        if split and layout.tokens(prompt, completions) > budget:
            parts = _cut(rows, layout.row_demands(prompt, completions, budget))
        for part in parts:
            lengths = [completion_lengths[row] for row in part]
            units.append(part)
            demands.append(layout.demand(prompt, lengths, budget))
    batches = _first_fit(units, demands)

    def largest_first(batch: list[Unit]) -> tuple[int, int]:
        return -batch_tokens(batch, prompt_lengths, completion_lengths, layout), batch[0][0]

    return sorted(batches, key=largest_first)


def _lengths(
    rows: Sequence[int], prompt_lengths: Sequence[int], completion_lengths: Sequence[int]
) -> UnitLengths:
    """(P, [L of each row]) of rows of one group."""
    prompt = prompt_lengths[rows[0]]
    assert prompt > 0, (rows[0], prompt)
    assert all(prompt_lengths[row] == prompt for row in rows), ("prompts of a group differ", rows)
    return prompt, [completion_lengths[row] for row in rows]


def _cut(rows: Unit, demands: Sequence[Demand]) -> list[Unit]:
    """Parts of a group that fit the budget, each row over it alone."""
    parts = _first_fit([[row] for row in rows], demands)
    return [sorted(row for (row,) in part) for part in parts]


def _first_fit(units: Sequence[Unit], demands: Sequence[Demand]) -> list[list[Unit]]:
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
