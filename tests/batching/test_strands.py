"""Trajectories in micro-batches: several strands of a row, of which some tokens count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rloo_fast.batching.budget import TokenBudget
from rloo_fast.batching.layouts import LAYOUTS
from rloo_fast.batching.packing import completions_of
from rloo_fast.batching.planner import Planner
from rloo_fast.batching.strands import row_tokens, run_strands
from rloo_fast.record_rows import as_plain, concatenate, from_plain, take_rows
from rloo_fast.records import BatchSizes, GenerationBatch
from tests.support.batches import generation_batch, trajectory_batch

several = settings(max_examples=60, deadline=None, derandomize=True)


def planner_of(layout, budget):
    planner = Planner(TokenBudget(1, budget), device=torch.device("cpu"), pad_token_id=0)
    planner.layout_name = layout
    return planner


def test_what_is_run_of_a_strand_ends_before_its_last_counted_token():
    batch = generation_batch(
        [[5]] * 2,
        [[1, 2, 3, 4, 9, 9], [6]],
        num_tokens=[3, 0],
        strand_ids=[[[1, 2, 3], [1, 2, 3, 4, 9, 9], [7]], [[6]]],
        counted=[[[0], [1, 3], []], [[]]],
    )
    assert run_strands(batch, 0) == [([], [0]), ([1, 2, 3], [1, 3])]
    assert run_strands(batch, 1) == []
    assert [ids for ids, _ in run_strands(batch, 0, every_token=True)] == batch.strand_ids[0]
    assert row_tokens(batch, LAYOUTS["packed"]) == [(0, 3), 0]
    assert row_tokens(batch, LAYOUTS["shared_prefix"]) == [3, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
@several
@given(st.integers(0, 10**6), st.integers(8, 120), st.booleans())
def test_every_counted_token_is_a_target_of_its_row_once(layout, seed, budget, split):
    batch = trajectory_batch(seed)
    planner = planner_of(layout, budget)
    plans = planner.plan(batch, range(batch.num_rows), split=split)
    assert sorted(r for plan in plans for unit in plan.units for r in unit) == [
        *range(batch.num_rows)
    ]
    for plan in plans:
        made = planner.micro_batch(batch, plan)
        bounds = made.cu_seqlens.tolist()
        assert bounds[-1] == len(made.targets) == len(made.logit_index)
        for number, row in enumerate(made.rows):
            wanted = [ids[place] for ids, counted in batch.strands(row) for place in counted]
            assert made.targets[bounds[number] : bounds[number + 1]].tolist() == wanted
        alone = len(plan.units) == 1 and (len(plan.units[0]) == 1 or not split)
        assert alone or made.input_ids.numel() <= budget


@several
@given(st.integers(0, 10**6))
def test_a_plan_never_counts_fewer_tokens_than_are_run(seed):
    batch = trajectory_batch(seed)
    lengths = {name: row_tokens(batch, layout) for name, layout in LAYOUTS.items()}
    for row in range(batch.num_rows):
        for name, layout in LAYOUTS.items():
            if not batch.num_tokens[row]:
                continue
            plan = planner_of(name, 10**6).plan(batch, [row], split=True)
            run = planner_of(name, 10**6).micro_batch(batch, plan[0]).input_ids.numel()
            completions = completions_of(lengths[name][row])
            assert run == layout.tokens(len(batch.prompt_ids[row]), completions)


def test_the_longest_row_is_all_of_its_strands():
    batch = generation_batch(
        [[5, 5]] * 2,
        [[1, 2, 9, 9], [6]],
        strand_ids=[[[1, 2, 3, 4, 5], [1, 2, 9, 9]], [[6]]],
        counted=[[[4], [3]], [[0]]],
        num_tokens=[2, 1],
    )
    assert planner_of("packed", None).sizes_here(batch)[0] == (2 + 4) + (2 + 3)
    assert planner_of("padded", None).sizes_here(batch)[0] == 2 * (2 + 4)
    assert planner_of("shared_prefix", None).sizes_here(batch)[0] == 2 + 4 + 3


def test_they_are_cut_joined_and_saved_with_their_rows(tmp_path):
    batch = trajectory_batch(3)
    halves = [take_rows(batch, range(start, start + 3)) for start in (0, 3, 6)]
    back = concatenate([halves[2], halves[0]])
    assert back.strand_ids == batch.strand_ids[6:9] + batch.strand_ids[:3]
    assert back.counted == batch.counted[6:9] + batch.counted[:3]
    torch.save(as_plain(batch), tmp_path / "saved.pt")
    kept = from_plain(GenerationBatch, torch.load(tmp_path / "saved.pt", weights_only=True))
    assert [kept.strands(r) for r in range(9)] == [batch.strands(r) for r in range(9)]
    assert kept.sizes == BatchSizes()
