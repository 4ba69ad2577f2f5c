"""Micro-batches on several processes: as many on each, and what runs out of memory is agreed on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_policy import make_samples

from rloo_fast.planner import Planner, Step

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def planner_beside(other: int) -> Planner:
    """The planner of one of two processes; the other gives `other` to every gather."""
    accelerator = SimpleNamespace(
        num_processes=2,
        device=torch.device("cpu"),
        gather=lambda mine: torch.cat([mine, torch.full_like(mine, other)]),
    )
    planner = Planner(accelerator, rows=2, max_tokens=99, pad_token_id=0)  # pyright: ignore
    planner.layout = "shared_prefix"
    return planner


@pytest.mark.parametrize(("mine", "other", "want"), [(1, 3, 3), (3, 1, 3), (0, 1, 1), (2, 2, 2)])
def test_as_many_micro_batches_as_on_the_process_with_most(mine, other, want):
    samples = make_samples()
    steps = [Step(samples, [[0]]) for _ in range(mine)]
    got = planner_beside(other).even(steps, samples)
    assert len(got) == want
    assert got[want - mine :] == steps  # fillers first: a real one reduces the gradients
    assert all(step.units == [] for step in got[: want - mine])


def run(planner, fails, last_synchronises=True):
    """(success, units of every micro-batch that was run); number `fails` is out of memory."""
    samples, ran = make_samples(), []

    def run_one(step, last):
        ran.append(step.units)
        if len(ran) - 1 == fails:
            raise OUT_OF_MEMORY

    steps = [Step(samples, [[row]]) for row in range(3)]
    return planner.run(steps, run_one, last_synchronises=last_synchronises), ran


def test_a_process_without_memory_goes_on_with_fillers_and_no_gradient_is_reduced():
    assert run(planner_beside(0), fails=0) == (False, [[[0]], []])


def test_a_process_hears_of_anothers_lack_of_memory_before_gradients_are_reduced():
    assert run(planner_beside(1), fails=None) == (False, [[[0]], [[1]]])


def test_without_gradients_all_micro_batches_are_run_first():
    assert run(planner_beside(0), fails=0, last_synchronises=False) == (False, [[[0]], [], []])
    assert run(planner_beside(0), fails=2, last_synchronises=False)[0] is False
    assert run(planner_beside(0), fails=None, last_synchronises=False)[0] is True


def test_what_fails_while_gradients_are_reduced_is_not_taken_back():
    with pytest.raises(torch.OutOfMemoryError):
        run(planner_beside(0), fails=2)
