"""Weighted rewards -> scores, in the order penalty, normalisation, clip."""

import math

import pytest
import torch

from rloo_fast.rewards.shaping import SoftPunish, shape_scores

NAN = math.nan
REWARDS = torch.tensor([1.0, 4.0, NAN, -5.0])
MISSING = torch.tensor([True, False, True, False])


@pytest.mark.parametrize(
    ("options", "want"),
    {
        "nothing": ({}, [1.0, 4.0, NAN, -5.0]),
        "penalty": ({"missing_eos_penalty": 3.0}, [-2.0, 4.0, NAN, -5.0]),
        "clip": ({"clip_range": [-2.0, 3.0]}, [1.0, 3.0, NAN, -2.0]),
        # mean 0, squares 1 + 16 + 25 over n - 1 = 2
        "normalise": ({"normalize": True}, [x / 21**0.5 for x in (1.0, 4.0, NAN, -5.0)]),
        # (-2, 4, -5): mean -1, squares 1 + 25 + 16 over 2
        "penalty, normalise, clip": (
            {"missing_eos_penalty": 3.0, "normalize": True, "clip_range": [-0.5, 1.0]},
            [-1 / 21**0.5, 1.0, NAN, -0.5],
        ),
    }.values(),
)
def test_scores(options, want):
    torch.testing.assert_close(
        shape_scores(REWARDS, MISSING, **options), torch.tensor(want), equal_nan=True
    )


def test_a_single_scorable_row_is_normalised_to_zero():
    got = shape_scores(torch.tensor([NAN, 7.0]), torch.tensor([False, False]), normalize=True)
    torch.testing.assert_close(got, torch.tensor([NAN, 0.0]), equal_nan=True)


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1, 0.0), (12, 0.0), (13, -0.125), (16, -0.5), (19, -0.875), (20, -1.0), (25, -1.0)],
)
def test_soft_overlong_punishment_is_that_of_dapo(length, expected):
    """Equation 13 of arXiv:2503.14476 with L_max = 20, L_cache = 8."""
    rewards = torch.tensor([1.0, NAN])
    scores = shape_scores(
        rewards,
        torch.zeros(2, dtype=torch.bool),
        torch.tensor([length, length]),
        soft_punish=SoftPunish(longest=20, cache=8),
    )
    assert scores[0].item() == pytest.approx(1 + expected)
    assert scores[1].isnan()


def test_the_punishment_comes_before_the_clip():
    scores = shape_scores(
        torch.tensor([0.5, -0.5]),
        torch.zeros(2, dtype=torch.bool),
        torch.tensor([20, 20]),
        soft_punish=SoftPunish(20, 8),
        clip_range=[-0.75, 0.75],
    )
    assert scores.tolist() == [-0.5, -0.75]
