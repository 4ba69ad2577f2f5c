"""Groups over processes where they share tokens: each process runs a shared token once."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .packing import balance
from .prefix_tree import Branch, first_row


class _Family(NamedTuple):
    """Groups that share tokens, or a group alone; in the order of a heap, most to compute first."""

    minus_cost: float
    first: int
    number: int  # so that nothing behind it is compared
    groups: list[int]
    parts: list[_Family]


def balance_tree(
    costs: Sequence[float],
    tree: Sequence[Branch],
    cost_of: Callable[[int], float],
    num_ranks: int,
) -> list[list[int]]:
    """Group numbers of each rank, ascending: equally many on each.

    `costs`: of each group beside what its branch shares; `cost_of`: of so many first tokens. Of two
    ways that whose most loaded rank has less to compute: groups spread evenly, as if they shared
    nothing, or those of a branch together, as far as they fit a rank.
    """
    ways = [balance(costs, num_ranks)]
    if len(tree) > 1:
        ways.append(_kept_together(costs, tree, cost_of, num_ranks))
    return min(ways, key=lambda ranks: max(rank_costs(ranks, costs, tree, cost_of)))


def rank_costs(
    ranks: Sequence[Sequence[int]],
    costs: Sequence[float],
    tree: Sequence[Branch],
    cost_of: Callable[[int], float],
) -> list[float]:
    """What each rank computes: its groups, and every branch above one of them once."""
    rank_of = {group: rank for rank, groups in enumerate(ranks) for group in groups}
    totals = [sum(costs[group] for group in groups) for groups in ranks]
    below: dict[int, set[int]] = {}  # branch -> ranks
    for branch in tree:
        below[id(branch)] = set()
        for child in branch.children:
            on = below[id(child)] if isinstance(child, Branch) else {rank_of[child]}
            below[id(branch)] |= on
            if isinstance(child, Branch):
                for rank in on:
                    totals[rank] += cost_of(child.depth) - cost_of(branch.depth)
    return totals


def _kept_together(
    costs: Sequence[float],
    tree: Sequence[Branch],
    cost_of: Callable[[int], float],
    num_ranks: int,
) -> list[list[int]]:
    """Families, largest first, to the rank with least so far that has room for them; those that no
    rank has room for, or that are more than a rank's share, in parts."""
    open_ones = [_families(costs, tree, cost_of)]
    share, places = -open_ones[0].minus_cost / num_ranks, len(costs) // num_ranks
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    while open_ones:
        family = heapq.heappop(open_ones)
        free = [r for r in range(num_ranks) if len(ranks[r]) + len(family.groups) <= places]
        if family.parts and (not free or -family.minus_cost > share):
            for part in family.parts:
                heapq.heappush(open_ones, part)
            continue
        rank = min(free, key=totals.__getitem__)
        ranks[rank] += family.groups
        totals[rank] -= family.minus_cost
    return [sorted(groups) for groups in ranks]


def _families(
    costs: Sequence[float], tree: Sequence[Branch], cost_of: Callable[[int], float]
) -> _Family:
    made: dict[int, _Family] = {}
    for number, branch in enumerate(tree):
        parts: list[_Family] = []
        for child in branch.children:
            if isinstance(child, Branch):
                more = cost_of(child.depth) - cost_of(branch.depth)
                part = made[id(child)]
                parts.append(part._replace(minus_cost=part.minus_cost - more))
            else:
                parts.append(_Family(-costs[child], child, len(tree) + child, [child], []))
        total = sum(part.minus_cost for part in parts)
        groups = [group for part in parts for group in part.groups]
        made[id(branch)] = _Family(total, first_row(branch), number, groups, parts)
    return made[id(tree[-1])]
