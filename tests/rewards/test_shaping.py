"""Weighted rewards -> scores, in the order penalty, normalisation, clip."""

import math

import pytest
import torch

from rloo_fast.rewards.shaping import shape_scores

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
