"""Groups -> micro-batches within a budget of tokens, and over processes. Deterministic.

P prompt tokens, L completion tokens of a row. A unit is a list of rows of one group: they share
the prompt, and in the shared-prefix layout it is run once for all of them. A micro-batch is a
list of units.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from itertools import chain
from operator import attrgetter, itemgetter
from typing import NamedTuple, TypeVar

from ..records import Unit
from .layouts.base import Demand, Layout, RowTokens, Sharing, UnitLengths
from .prefix_tree import Branch, branches

Item = TypeVar("Item")


def batch_tokens(
    batch: Sequence[Unit],
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[RowTokens],
    layout: Layout,
) -> int:
    """Tokens the model runs for a micro-batch; 0 for a filler."""
    return layout.batch_tokens(
        [_lengths(unit, prompt_lengths, completion_lengths) for unit in batch]
    )


def largest_group_tokens(
    groups: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[RowTokens],
    layout: Layout,
    sharing: Sharing | None = None,
) -> int:
    """Tokens of the largest whole group, 0 without groups: all fit if it is <= the budget."""
    largest = 0
    for number, rows in enumerate(groups):
        if rows:
            prompt, completions = _lengths(rows, prompt_lengths, completion_lengths)
            tokens = layout.tokens(prompt, completions)
            if sharing is not None:
                tokens = sharing.group_tokens(number, prompt, completions)
            largest = max(largest, tokens)
    return largest


def pack(
    groups: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[RowTokens],
    *,
    layout: Layout,
    budget: int,
    split: bool,
    sharing: Sharing | None = None,
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

    `sharing`: what groups and their rows, in the order given, have in common. What shares most is
    packed first, and each micro-batch that comes of it then goes, as one, into the next first-fit:
    tokens that several of its rows share take room once.
    """
    atoms: dict[int, list[_Atom]] = {}
    for number, rows in enumerate(groups):
        if rows:
            prompt = prompt_lengths[rows[0]]
            lengths = {row: completions_of(completion_lengths[row]) for row in rows}
            atoms[number] = _units_of_group(number, prompt, lengths, layout, budget, split, sharing)
    if not atoms:
        return []
    tree = [Branch(0, 0, [*atoms])] if sharing is None else branches(sharing.groups)
    packed = _pack_tree(tree, atoms, budget)

    def largest_first(atom: _Atom) -> tuple[int, int]:
        tokens = atom.demand.size
        if sharing is None:
            tokens = batch_tokens(atom.units, prompt_lengths, completion_lengths, layout)
        return -tokens, atom.units[0][0]

    return [atom.units for atom in sorted(packed, key=largest_first)]


class _Atom(NamedTuple):
    """Units that stay together, and what they take of a micro-batch of their own."""

    units: list[Unit]
    first: int  # lowest row number of their groups: what is as large is packed in its order
    demand: Demand


def _units_of_group(
    number: int,
    prompt: int,
    lengths: Mapping[int, Sequence[int]],
    layout: Layout,
    budget: int,
    split: bool,
    sharing: Sharing | None,
) -> list[_Atom]:
    """The group whole, or its parts that fit the budget, each row over it alone; `lengths`: row ->
    tokens of what it counts as."""
    rows, completions = [*lengths], [*chain(*lengths.values())]
    tokens = layout.tokens(prompt, completions)
    demand = layout.demand(prompt, completions, budget)
    if sharing is not None:
        tokens = sharing.group_tokens(number, prompt, completions)
        demand = Demand(tokens, tokens, budget)
    if not split or tokens <= budget:
        return [_Atom([sorted(rows)], min(rows), demand)]
    if sharing is None:
        tree = [Branch(0, 0, [*range(len(rows))])]
        demands = layout.row_demands(prompt, [*lengths.values()], budget)
    else:
        tree = branches(sharing.rows[number], root=prompt)
        demands = [Demand(prompt + n, prompt + n, budget) for n in completions]
    single = {
        i: [_Atom([[row]], row, demand)]
        for i, (row, demand) in enumerate(zip(rows, demands, strict=True))
    }
    parts: list[_Atom] = []
    for part in _pack_tree(tree, single, budget):
        unit = sorted(row for (row,) in part.units)
        demand = part.demand
        if sharing is None:
            some = [*chain.from_iterable(lengths[row] for row in unit)]
            demand = layout.demand(prompt, some, budget)
        parts.append(_Atom([unit], min(rows), demand))
    return parts


def _pack_tree(
    tree: Sequence[Branch], atoms: Mapping[int, list[_Atom]], budget: int
) -> list[_Atom]:
    """First-fit below each branch, children before their parents; `atoms` by number of a leaf.

    Below a branch its `depth` tokens take room once. An over-size atom is alone.
    """
    found: dict[int, list[_Atom]] = {}  # by the branch's id
    for branch in tree:
        below = [
            atom
            for child in branch.children
            for atom in (found[id(child)] if isinstance(child, Branch) else atoms.get(child, []))
        ]
        below.sort(key=attrgetter("first"))
        demands = [Demand(*(n - branch.depth for n in atom.demand)) for atom in below]
        found[id(branch)] = [
            _together(packed, branch.depth, budget) for packed in _first_fit(below, demands)
        ]
    return found[id(tree[-1])]


def _together(packed: list[_Atom], depth: int, budget: int) -> _Atom:
    size = depth + sum(atom.demand.size - depth for atom in packed)
    units = [unit for atom in packed for unit in atom.units]
    return _Atom(units, min(atom.first for atom in packed), Demand(size, size, budget))


def _lengths(
    rows: Sequence[int], prompt_lengths: Sequence[int], completion_lengths: Sequence[RowTokens]
) -> UnitLengths:
    """(P, [L of each completion]) of rows of one group."""
    prompt = prompt_lengths[rows[0]]
    assert prompt > 0, (rows[0], prompt)
    assert all(prompt_lengths[row] == prompt for row in rows), ("prompts of a group differ", rows)
    return prompt, [n for row in rows for n in completions_of(completion_lengths[row])]


def completions_of(tokens: RowTokens) -> tuple[int, ...]:
    """L of each completion that a row counts as."""
    return (tokens,) if isinstance(tokens, int) else tokens


def _first_fit(units: Sequence[Item], demands: Sequence[Demand]) -> list[list[Item]]:
    """Each unit, largest first (equal ones as given), into the first bin with room, or a new one.

    O(n log n): a tree over the bins holds in every node the most room below it. An over-size
    unit leaves its bin with less than none, so nothing follows it.
    """
    leaves = 1 << max(0, len(units) - 1).bit_length()
    most_room = [-1] * (2 * leaves)  # node i has children 2i and 2i + 1; -1: no bin yet
    bins: list[list[Item]] = []
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
