"""Panels without a drawing library: smoothing, limits, and whose metrics are whose."""

import math

import numpy as np
import pytest

from rloo_fast.reports.metric_names import is_user_metric
from rloo_fast.reports.panels import (
    LEARNING,
    RUN,
    Curve,
    Kind,
    axis_limits,
    choose_panels,
    curve,
    running_mean,
    usual_range,
)


def line(*values):
    values = np.array(values, dtype=float)
    return Curve(np.arange(len(values)), values, values)


def test_running_mean_begins_where_the_run_does_and_ends_with_what_there_is():
    values = np.array([0.0, 3.0, 6.0, 0.0])
    np.testing.assert_allclose(running_mean(values, 3), [0.0, 3.0, 3.0, 3.0])


def test_running_mean_leaves_out_what_is_not_finite():
    values = np.array([1.0, math.nan, 3.0, 5.0])
    np.testing.assert_allclose(running_mean(values, 3), [1.0, math.nan, 4.0, 4.0])


def test_the_start_of_a_long_run_is_no_single_noisy_value():
    noise = np.random.default_rng(0).normal(0, 1, 10_000)
    assert abs(running_mean(noise, 333)[0]) < 0.6


@pytest.mark.parametrize(("number", "is_smoothed"), [(30, False), (31, True)])
def test_few_logs_are_drawn_as_they_are(number, is_smoothed):
    rows = [{"x": step, "reward": step % 2} for step in range(number)]
    assert curve(rows, "reward").is_smoothed == is_smoothed


@pytest.mark.parametrize(
    ("values", "kind", "limits"),
    [
        ([5.99, 6.0], Kind("length", least_span=2.0), (4.895, 7.095)),
        ([100.0, 100.0], Kind("any"), (94.5, 105.5)),
        ([0.0, 0.0], Kind("any"), (-0.05, 0.05)),
        ([-1.0, 1.0], Kind("any"), (-1.1, 1.1)),
        ([0.99, 1.0], Kind("share", "", 0.1, (0.0, 1.0)), (0.895, 1.005)),
        ([0.0, 1e-3], Kind("share", "", 0.1, (0.0, 1.0)), (-0.005, 0.105)),
        ([1e-9, 2e-9], Kind("kl", "", 1e-3, from_zero=True), (-2e-5, 1.05e-3)),
        ([2.0, 4.0], Kind("norm", from_zero=True), (-0.08, 4.2)),
        ([-1.0, 4.0], Kind("norm", from_zero=True), (-1.25, 4.25)),
    ],
)
def test_axis_limits(values, kind, limits):
    assert axis_limits([line(*values)], kind) == pytest.approx(limits, abs=1e-5)


def test_a_beginning_is_no_spike():
    """What a run learns in its first logs belongs into the picture."""
    values = np.concatenate([np.linspace(-50, 0, 5), np.random.default_rng(0).normal(0, 0.1, 500)])
    low, high = usual_range(values)
    assert low <= -30
    assert high < 1


def test_a_spike_or_two_are_out_of_the_usual():
    values = np.ones(100)
    values[[20, 60, 61]] = 1e6, -1e6, math.inf
    assert usual_range(values) == (1.0, 1.0)


def test_no_metric_with_a_panel_is_the_users():
    assert not [name for name in (*RUN, *LEARNING) if is_user_metric(name) and name != "accuracy"]


def test_the_users_metrics_are_found_beside_their_evaluation():
    rows = [{"x": 1, "step": 1, "reward": 1.0, "mine": 2.0, "num_tokens": 3},
            {"x": 1, "step": 1, "eval_mine": 3.0, "eval_runtime": 1.0, "eval_kl": 0.0,
             "eval_samples_per_second": 2.0}]  # fmt: skip
    panels, left_out = choose_panels(rows, is_alone=True)
    assert [(p.key, p.beside) for p in panels] == [
        ("reward", {}),
        ("mine", {"evaluation": "eval_mine"}),
        ("kl", {"evaluation": "eval_kl"}),
    ]
    assert left_out == []
