"""Micro-batches within a token budget, and groups over ranks, against naive references and laws."""

import random
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rloo_fast.batching.layouts import LAYOUTS, UnitIds
from rloo_fast.batching.packing import balance, batch_tokens, largest_group_tokens, pack
from tests.support.batches import tree_batch

several = settings(max_examples=80, deadline=None, derandomize=True)
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
ONE_LINE = [LAYOUTS["shared_prefix"], LAYOUTS["packed"]]


@st.composite
def cases(draw):
    """(groups, prompt lengths, completion lengths, budget): ragged groups, rows in any order."""
    sizes = draw(st.lists(st.integers(0, 6), max_size=9))
    rows = draw(st.permutations(range(sum(sizes))))
    prompts, completions, groups = [0] * len(rows), [0] * len(rows), []
    for size in sizes:
        groups.append([rows.pop() for _ in range(size)])
        prompt = draw(st.integers(1, 12))
        for row in groups[-1]:
            prompts[row], completions[row] = prompt, draw(st.integers(0, 30))
    return groups, prompts, completions, draw(st.integers(1, 150))


def make_case(seed, num_groups, k):
    rng = random.Random(seed)
    prompts = [p for _ in range(num_groups) for p in [rng.randint(20, 400)] * k]
    completions = [rng.randint(0, 512) for _ in prompts]
    groups = [list(range(start, start + k)) for start in range(0, len(prompts), k)]
    return groups, prompts, completions


def count(batch, prompts, completions, layout):
    """Tokens that the model is given for a micro-batch, laid out and counted."""
    tokens = []
    width = max((prompts[row] + completions[row] for unit in batch for row in unit), default=0)
    for unit in batch:
        for place, row in enumerate(unit):
            if layout.name == "padded":
                tokens += ["token"] * width
                continue
            if layout.name == "packed" or place == 0:
                tokens += ["prompt"] * prompts[row]
            tokens += ["completion"] * completions[row]
    return len(tokens)


def counts(plan, prompts, completions, layout):
    return Counter(count(batch, prompts, completions, layout) for batch in plan)


def cut_and_pack(case, layout):
    return pack(*case[:3], layout=layout, budget=case[3], split=True)


def naive_pack(groups, prompts, completions, layout, budget):
    """First-fit by trying every micro-batch and counting its tokens: O(n^2)."""

    def size(unit):
        if layout.name == "padded":
            return max(prompts[r] + completions[r] for r in unit), len(unit)
        return count([unit], prompts, completions, layout)

    units = sorted(sorted(group) for group in groups if group)
    plan = []
    for unit in sorted(units, key=size, reverse=True):
        for batch in plan:
            if count([*batch, unit], prompts, completions, layout) <= budget:
                batch.append(unit)
                break
        else:
            plan.append([unit])
    return sorted(plan, key=lambda b: (-count(b, prompts, completions, layout), b[0][0]))


def partitions(items):
    """All ways to cut a list into parts."""
    if not items:
        yield []
        return
    for parts in partitions(items[1:]):
        yield [[items[0]], *parts]
        for i, part in enumerate(parts):
            yield [*parts[:i], [items[0], *part], *parts[i + 1 :]]


# Tokens


@layouts
@several
@given(cases())
def test_tokens_are_those_laid_out(layout, case):
    groups, prompts, completions, _ = case
    units = [group for group in groups if group]
    want = [count([unit], prompts, completions, layout) for unit in units]
    lengths = [(prompts[unit[0]], [completions[row] for row in unit]) for unit in units]
    assert [layout.tokens(*pair) for pair in lengths] == want
    assert largest_group_tokens(groups, prompts, completions, layout) == max(want, default=0)
    whole = count(units, prompts, completions, layout)
    assert batch_tokens(units, prompts, completions, layout) == whole


def test_tokens_of_the_tldr_group():
    """DESIGN's figures: prompt 400, 4 completions of 53 tokens."""
    got = {name: layout.tokens(400, [53] * 4) for name, layout in LAYOUTS.items()}
    assert got == {"shared_prefix": 612, "packed": 1812, "padded": 1812}


# Micro-batches


@layouts
@several
@given(cases())
def test_it_is_first_fit(layout, case):
    groups, prompts, completions, budget = case
    got = pack(groups, prompts, completions, layout=layout, budget=budget, split=False)
    assert got == naive_pack(groups, prompts, completions, layout, budget)


@layouts
@pytest.mark.parametrize(("num_groups", "budget"), [(255, 1500), (256, 4000), (257, 9000)])
def test_it_is_first_fit_for_many_groups(layout, num_groups, budget):
    case = make_case(num_groups, num_groups, 3)
    got = pack(*case, layout=layout, budget=budget, split=False)
    assert got == naive_pack(*case, layout, budget)


@layouts
@several
@given(cases())
def test_every_row_once_and_no_empty_micro_batch(layout, case):
    plan = cut_and_pack(case, layout)
    assert all(unit for batch in plan for unit in [batch, *batch])
    rows = [row for batch in plan for unit in batch for row in unit]
    assert sorted(rows) == list(range(len(case[1])))


@layouts
@several
@given(cases())
def test_units_are_whole_groups_within_the_budget_or_parts_of_larger(layout, case):
    groups, prompts, completions, budget = case
    for unit in (unit for batch in cut_and_pack(case, layout) for unit in batch):
        assert unit == sorted(unit)
        (group,) = [group for group in groups if unit[0] in group]
        if count([group], prompts, completions, layout) <= budget:
            assert unit == sorted(group)
        assert set(unit) <= set(group)


@layouts
@several
@given(cases())
def test_only_a_single_row_is_over_the_budget(layout, case):
    _, prompts, completions, budget = case
    for batch in cut_and_pack(case, layout):
        if count(batch, prompts, completions, layout) > budget:
            assert [len(unit) for unit in batch] == [1]


@layouts
@several
@given(cases())
def test_most_tokens_first(layout, case):
    tokens = [count(batch, *case[1:3], layout) for batch in cut_and_pack(case, layout)]
    assert tokens == sorted(tokens, reverse=True)


@layouts
@several
@given(cases())
def test_parts_are_packed_as_groups_are(layout, case):
    """A cut group's parts are units like others: given as groups, as many tokens go together."""
    _, prompts, completions, budget = case
    plan = cut_and_pack(case, layout)
    units = [unit for batch in plan for unit in batch]
    want = naive_pack(units, prompts, completions, layout, budget)
    assert counts(plan, prompts, completions, layout) == counts(want, prompts, completions, layout)


@layouts
@several
@given(cases())
def test_few_parts(layout, case):
    """The fewest when padded; otherwise first-fit decreasing's 11/9 of the fewest + 6/9."""
    groups, prompts, completions, budget = case
    for group in filter(None, groups):
        plan = pack([group], prompts, completions, layout=layout, budget=budget, split=True)
        num_parts = sum(map(len, plan))

        def allowed(part, group=group):
            return len(part) == 1 or count([part], prompts, completions, layout) <= budget

        fewest = min(len(parts) for parts in partitions(group) if all(map(allowed, parts)))
        assert fewest <= num_parts
        assert num_parts <= (fewest if layout.name == "padded" else (11 * fewest + 6) // 9)


@layouts
@several
@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_groups_and_rows_changes_nothing(layout, case, rng):
    groups = [rng.sample(group, len(group)) for group in rng.sample(case[0], len(case[0]))]
    assert cut_and_pack((groups, *case[1:]), layout) == cut_and_pack(case, layout)


@layouts
@several
@given(cases(), st.randoms(use_true_random=False))
def test_numbering_the_rows_otherwise_keeps_the_token_counts(layout, case, rng):
    groups, prompts, completions, budget = case
    new = rng.sample(range(len(prompts)), len(prompts))
    old = sorted(range(len(prompts)), key=new.__getitem__)
    moved = [[new[row] for row in group] for group in groups]
    lengths = [prompts[row] for row in old], [completions[row] for row in old]
    got = counts(cut_and_pack((moved, *lengths, budget), layout), *lengths, layout)
    assert got == counts(cut_and_pack(case, layout), prompts, completions, layout)


@pytest.mark.parametrize("layout", ONE_LINE, ids=["shared_prefix", "packed"])
@pytest.mark.parametrize("parts_per_budget", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_micro_batches_are_well_filled(layout, parts_per_budget, seed):
    """Units of at most 1/m of the budget leave at most 1/m of it free, but in the last opened;
    any two micro-batches together are over the budget."""
    case = make_case(seed, 97, 4)
    budget = parts_per_budget * largest_group_tokens(*case, layout)
    plan = pack(*case, layout=layout, budget=budget, split=False)
    tokens = [batch_tokens(batch, *case[1:], layout) for batch in plan]
    assert sum(tokens[-2:]) > budget
    filled = max(1 - 1 / parts_per_budget, 1 / 2)
    assert len(plan) <= sum(tokens) / (filled * budget) + 1


@pytest.fixture(scope="module")
def large_cases():
    return {k: make_case(0, 100_000 // k, k) for k in (8, 1)}


@layouts
@pytest.mark.parametrize(("k", "most_s"), [(8, 6), (1, 15)])
def test_planning_100_000_rows_takes_no_time(layout, k, most_s, large_cases):
    """0.1 to 0.4 s in groups of 8, about 1 s in groups of 1; a scan over the micro-batches would
    take minutes."""
    case = large_cases[k]
    start = time.process_time()
    plan = cut_and_pack((*case, 4096), layout)
    assert time.process_time() - start < most_s
    assert sum(len(unit) for batch in plan for unit in batch) == 100_000


def test_rows_of_one_group_have_one_prompt():
    with pytest.raises(AssertionError, match="prompts of a group differ"):
        pack([[0, 1]], [3, 4], [1, 1], layout=LAYOUTS["packed"], budget=9, split=False)


def test_a_filler_has_no_tokens():
    assert [batch_tokens([], [], [], layout) for layout in LAYOUTS.values()] == [0, 0, 0]


# Groups that share tokens


@st.composite
def trees(draw):
    """(groups, prompts, completions, budget, split) of groups that begin like others."""
    batch = tree_batch(draw(st.integers(0, 10**6)), num_groups=draw(st.integers(1, 7)))
    runs = [
        ids[: max(0, n - 1)] for ids, n in zip(batch.completion_ids, batch.num_tokens, strict=True)
    ]
    groups = [[*range(start, start + 3)] for start in range(0, batch.num_rows, 3)]
    return groups, batch.prompt_ids, runs, draw(st.integers(1, 150)), draw(st.booleans())


def packed_trees(groups, prompts, runs, budget, split):
    layout = LAYOUTS["shared_prefix"]
    sharing = layout.sharing(
        [prompts[rows[0]] for rows in groups], [[runs[row] for row in rows] for rows in groups]
    )
    lengths = [len(p) for p in prompts], [len(ids) for ids in runs]
    plan = pack(groups, *lengths, layout=layout, budget=budget, split=split, sharing=sharing)
    return plan, sharing, lengths


def tokens_laid_out(batch, prompts, runs):
    units = [
        UnitIds(prompts[unit[0]], [runs[row] for row in unit], [[0]] * len(unit)) for unit in batch
    ]
    found = LAYOUTS["shared_prefix"].lines(units, pad_token_id=0, multiple_of=1, sizes=None)
    return len(found.input_ids[0])


@several
@given(trees())
def test_trees_fit_the_budget_with_every_row_once(case):
    groups, prompts, runs, budget, split = case
    plan, sharing, lengths = packed_trees(*case)
    rows = [row for batch in plan for unit in batch for row in unit]
    assert sorted(rows) == [row for group in groups for row in group]
    for batch in plan:
        if len([row for unit in batch for row in unit]) > (1 if split else 3):
            assert tokens_laid_out(batch, prompts, runs) <= budget
            assert sum(len(runs[row]) for unit in batch for row in unit) <= max(
                budget, *(len(p) for p in prompts)
            )
    layout = LAYOUTS["shared_prefix"]
    if largest_group_tokens(groups, *lengths, layout, sharing) <= budget:
        assert all(unit in groups for batch in plan for unit in batch)


def test_fewer_tokens_and_micro_batches_than_by_lengths():
    """Over many batches; first-fit, of either, has its bad cases."""
    total = Counter()
    for seed in range(60):
        rng = random.Random(seed)
        batch = tree_batch(seed, num_groups=12)
        groups = [[*range(start, start + 3)] for start in range(0, batch.num_rows, 3)]
        case = groups, batch.prompt_ids, batch.completion_ids, rng.randint(50, 150), True
        plan, _, lengths = packed_trees(*case)
        layout = LAYOUTS["shared_prefix"]
        by_lengths = pack(groups, *lengths, layout=layout, budget=case[3], split=True)
        for name, batches in (("ours", plan), ("by lengths", by_lengths)):
            total[name, "micro-batches"] += len(batches)
            total[name, "tokens"] += sum(tokens_laid_out(b, *case[1:3]) for b in batches)
    for what in ("micro-batches", "tokens"):
        assert total["ours", what] < 0.92 * total["by lengths", what]


def test_prompts_that_begin_alike_are_packed_together():
    """Four documents of 300 tokens, four questions about each in turn, room for one document."""
    rng = random.Random(1)
    documents = [[rng.randrange(1000) for _ in range(300)] for _ in range(4)]
    prompts = [documents[i % 4] + [1000 + i] * 5 for i in range(16)]
    runs = [[2000 + i] * 40 for i in range(16)]
    case = [[row] for row in range(16)], prompts, runs, 500, False
    plan, *_ = packed_trees(*case)
    assert sorted(sorted(row for (row,) in batch) for batch in plan) == [
        [i, i + 4, i + 8, i + 12] for i in range(4)
    ]
    assert {tokens_laid_out(batch, prompts, runs) for batch in plan} == {300 + 4 * 45}


def test_what_shares_nothing_is_packed_as_ever():
    groups, prompt_lengths, completion_lengths = make_case(3, 60, 3)
    prompts = [[row // 3] * n for row, n in enumerate(prompt_lengths)]
    runs = [[row] * n for row, n in enumerate(completion_lengths)]
    for budget in (300, 2000):
        plan, *_ = packed_trees(groups, prompts, runs, budget, True)
        assert plan == cut_and_pack(
            (groups, prompt_lengths, completion_lengths, budget), LAYOUTS["shared_prefix"]
        )


# Ranks


@st.composite
def costs_and_ranks(draw):
    num_ranks, per_rank = draw(st.integers(1, 6)), draw(st.integers(0, 7))
    size = num_ranks * per_rank
    cost = st.one_of(st.integers(0, 9), st.integers(0, 1000))
    return draw(st.lists(cost, min_size=size, max_size=size)), num_ranks


def spread(costs, ranks):
    sums = [sum(costs[item] for item in items) for items in ranks]
    return max(sums) - min(sums)


@settings(several, max_examples=300)
@given(costs_and_ranks())
def test_balance_is_a_partition_and_even(case):
    costs, num_ranks = case
    ranks = balance(costs, num_ranks)
    assert [len(items) for items in ranks] == [len(costs) // num_ranks] * num_ranks
    assert sorted(item for items in ranks for item in items) == list(range(len(costs)))
    assert all(items == sorted(items) for items in ranks)
    assert spread(costs, ranks) <= max(costs, default=0)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_balance_beats_taking_turns(num_ranks):
    rng = random.Random(num_ranks)
    ours = turns = 0.0
    for _ in range(50):
        costs = [rng.lognormvariate(7, 1) for _ in range(16 * num_ranks)]
        ours += spread(costs, balance(costs, num_ranks))
        turns += spread(costs, [range(rank, len(costs), num_ranks) for rank in range(num_ranks)])
    assert ours < turns / 10


@pytest.mark.parametrize("layout", ONE_LINE, ids=["shared_prefix", "packed"])
@several
@given(st.integers(1, 9), st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_cost_counts_the_pairs_of_a_causal_mask(layout, prompt, completions):
    """One by one; the formula has n^2/2 for n (n + 1)/2, half a pair less for each query."""
    pairs = queries = 0
    for number, length in enumerate(completions):
        first = (
            prompt if layout.name == "shared_prefix" and number > 0 else 0
        )  # the prompt ran already
        for position in range(first, prompt + length):
            queries += 1
            pairs += position + 1
    got = layout.cost(prompt, completions, tokens_per_pair=4.0)
    assert queries == layout.tokens(prompt, completions)
    assert got == queries + (pairs - queries / 2) / 4.0


def test_cost_when_padded_counts_the_tokens_run():
    assert LAYOUTS["padded"].cost(2, [1, 4], tokens_per_pair=0.5) == 12 + (9 / 2 + 36 / 2) / 0.5
