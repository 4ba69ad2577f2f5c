"""Times of a step and its stages."""

from __future__ import annotations

import time

import pytest
import torch

from rloo_fast.step.clock import StepClock


@pytest.fixture
def clock():
    return StepClock(torch.device("cpu"))


def test_a_stage_adds_up_over_a_step(clock):
    for _ in range(2):
        with clock.stage("reward"):
            sum(range(10_000))
    first = clock.stages["reward"]
    with clock.stage("reward"):
        sum(range(10_000))
    assert 0 < first < clock.stages["reward"]


def test_a_step_begins_without_the_stages_of_the_one_before(clock):
    with clock.stage("reward"):
        pass
    clock.begin_step()
    assert not clock.stages


def test_the_optimizer_is_the_last_stage_of_a_step(monkeypatch, clock):
    now = iter([10.0, 14.0, 15.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock.begin_step()
    clock.begin_optimizer()
    clock.end_step()
    assert clock.stages == {"optimizer": 1.5}
    assert clock.step_s == 5.5


def test_the_time_of_a_run_counts_from_its_first_step_and_begins_with_the_second(
    monkeypatch, clock
):
    now = iter([10.0, 14.0, 15.0, 20.0, 21.0, 22.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    times = []
    for _ in range(2):
        clock.begin_step()
        clock.begin_optimizer()
        clock.end_step()
        times.append(clock.run_s)
    assert times == [None, 12.0]
