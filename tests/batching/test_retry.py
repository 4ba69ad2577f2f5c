"""Micro-batches on several processes: as many on each, and what runs out of memory is agreed on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rloo_fast.batching.budget import TokenBudget
from rloo_fast.batching.retry import MicroBatchRunner, equal_numbers
from rloo_fast.records import BatchSizes, MicroBatchPlan
from tests.support.batches import generation_batch

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
FILLER = MicroBatchPlan([], 99)


def beside(other: int) -> Any:
    """The accelerator of one of two processes; the other gives `other` to every gather."""
    return SimpleNamespace(
        num_processes=2,
        device=torch.device("cpu"),
        gather=lambda mine: torch.cat([mine, torch.full_like(mine, other)]),
    )


@pytest.mark.parametrize(("mine", "other", "want"), [(1, 3, 3), (3, 1, 3), (0, 1, 1), (2, 2, 2)])
def test_as_many_micro_batches_as_on_the_process_with_most(mine, other, want):
    plans = [MicroBatchPlan([[0]], 99) for _ in range(mine)]
    got = equal_numbers(plans, FILLER, beside(other))
    assert len(got) == want
    assert got[want - mine :] == plans  # fillers first: a real one reduces the gradients
    assert got[: want - mine] == [FILLER] * (want - mine)


def run(other, fails, last_synchronises=True, can_retry=True):
    """(success, units of every micro-batch that was run); number `fails` is out of memory."""
    ran = []

    def run_one(plan, last):
        ran.append(plan.units)
        if len(ran) - 1 == fails:
            raise OUT_OF_MEMORY

    plans = [MicroBatchPlan([[row]], 99) for row in range(3)]
    runner = MicroBatchRunner(beside(other), can_retry=can_retry)
    return runner.run(plans, run_one, last_synchronises=last_synchronises), ran


def test_a_process_without_memory_goes_on_with_fillers_and_no_gradient_is_reduced():
    assert run(0, fails=0) == (False, [[[0]], []])


def test_a_process_hears_of_anothers_lack_of_memory_before_gradients_are_reduced():
    assert run(1, fails=None) == (False, [[[0]], [[1]]])


def test_without_gradients_all_micro_batches_are_run_first():
    assert run(0, fails=0, last_synchronises=False) == (False, [[[0]], [], []])
    assert run(0, fails=2, last_synchronises=False)[0] is False
    assert run(0, fails=None, last_synchronises=False)[0] is True


def test_what_fails_while_gradients_are_reduced_is_not_taken_back():
    with pytest.raises(torch.OutOfMemoryError) as failure:
        run(0, fails=2)
    assert "set max_tokens_per_micro_batch=49" in failure.value.__notes__[0]


def test_an_engine_whose_collectives_cannot_wait_takes_nothing_back():
    with pytest.raises(torch.OutOfMemoryError):
        run(0, fails=0, can_retry=False)


def shrink(units, other=0):
    budget = TokenBudget(rows=4)
    batch = generation_batch([[1]] * 2, [[1]] * 2, sizes=BatchSizes(longest_row=10))
    runner = MicroBatchRunner(beside(other), can_retry=True)
    runner.shrink(budget, batch, [MicroBatchPlan(u, 40) for u in units])
    return budget.of(batch)


def test_the_budget_is_halved():
    assert shrink([[[0, 1]]]) == 20
    assert shrink([[[0], [1]]]) == 20


def test_single_completions_cannot_be_cut_unless_another_process_has_more_of_them():
    with pytest.raises(RuntimeError, match="with a single completion in a micro-batch"):
        shrink([[[0]], [[1]], []])
    assert shrink([[[0]], [[1]], []], other=1) == 20
