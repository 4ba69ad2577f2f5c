"""Groups that share tokens over processes: equally many on each, together where that is less."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rloo_fast.batching.packing import balance
from rloo_fast.batching.prefix_tree import EVERY, branches, key_of, shared
from rloo_fast.batching.tree_balance import balance_tree, rank_costs

several = settings(max_examples=60, deadline=None, derandomize=True)


def tree_of(prompts):
    return branches(shared([key_of(prompt) for prompt in prompts], ends=False))


@several
@given(st.integers(1, 4), st.integers(1, 5), st.randoms(use_true_random=False))
def test_every_group_is_on_one_rank_and_no_worse_than_spread(num_ranks, per_rank, rng):
    n = num_ranks * per_rank
    prompts = [[rng.randint(0, 1) for _ in range(rng.randint(1, 20))] for _ in range(n)]
    costs, tree = [rng.randint(0, 40) for _ in range(n)], tree_of(prompts)
    ranks = balance_tree(costs, tree, float, num_ranks)
    assert [len(groups) for groups in ranks] == [per_rank] * num_ranks
    assert sorted(group for groups in ranks for group in groups) == [*range(n)]
    assert all(groups == sorted(groups) for groups in ranks)
    found, spread = (rank_costs(r, costs, tree, float) for r in (ranks, balance(costs, num_ranks)))
    assert max(found) <= max(spread)


@several
@given(st.integers(1, 4), st.randoms(use_true_random=False))
def test_costs_of_ranks_are_their_tokens(num_ranks, rng):
    prompts = [[rng.randint(0, 1) for _ in range(rng.randint(1, 20))] for _ in range(4 * num_ranks)]
    tree = tree_of(prompts)
    deepest = {c: b.depth for b in tree for c in b.children if isinstance(c, int)}
    ranks = balance([1.0] * len(prompts), num_ranks)
    for groups, cost in zip(
        ranks, rank_costs(ranks, [0.0] * len(prompts), tree, float), strict=True
    ):
        seen = {tuple(prompts[g][: i + EVERY]) for g in groups for i in range(0, deepest[g], EVERY)}
        assert cost == EVERY * len(seen)


def test_where_nothing_is_shared_groups_are_spread_as_ever():
    rng = random.Random(0)
    prompts = [[10 * i, 1, 2, 3] for i in range(24)]
    costs = [rng.lognormvariate(7, 1) for _ in prompts]
    assert balance_tree(costs, tree_of(prompts), float, 4) == balance(costs, 4)


def test_long_documents_are_kept_on_one_rank_each():
    """Two documents of 4,000 tokens, four short questions about each, two ranks."""
    prompts = [[document] * 4000 + [question] for question in range(4) for document in (8, 9)]
    costs, tree = [500.0, 400.0] * 4, tree_of(prompts)
    ranks = balance_tree(costs, tree, float, 2)
    assert sorted(ranks) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert max(rank_costs(ranks, costs, tree, float)) < 6000
    assert max(rank_costs(balance(costs, 2), costs, tree, float)) > 9000


@pytest.mark.parametrize("system", [10, 1000])
def test_a_system_prompt_of_all_is_paid_once_by_each(system):
    rng = random.Random(system)
    prompts = [[1] * (system - system % 3) + [2 + i] * 50 for i in range(8)]
    costs = [float(rng.randint(100, 2000)) for _ in prompts]
    ranks = balance_tree(costs, tree_of(prompts), float, 2)
    best = min(
        max(sum(costs[i] for i in half), sum(costs) - sum(costs[i] for i in half))
        for half in combinations(range(8), 4)
    )
    assert max(sum(costs[i] for i in groups) for groups in ranks) <= 1.1 * best
