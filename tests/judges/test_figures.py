"""Win rates and their intervals."""

from __future__ import annotations

import pytest
import torch

from rloo_fast.judges.compare import TIE, Judgement, Verdict
from rloo_fast.judges.figures import summarize, wilson


def test_pair_without_a_verdict_in_one_order_is_not_decided():
    rows = [
        [Judgement(0, Verdict(0)), Judgement(1, Verdict(None, "unreadable"))],
        [Judgement(0, Verdict(0)), Judgement(1, Verdict(1))],
        [Judgement(0, Verdict(None, TIE)), Judgement(1, Verdict(0))],
    ]
    figures = summarize(rows)
    assert (figures["num_decided"], figures["win_rate"]) == (1, 1.0)
    assert (figures["num_ties"], figures["no_verdict"]) == (1, {"unreadable": 1})


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval(wins, n, low, high):
    assert wilson(wins / n, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_covers_95_of_100_experiments():
    generator = torch.Generator().manual_seed(0)
    rates = (torch.rand(4000, 200, generator=generator) < 0.33).double().mean(1).tolist()
    covered = [low <= 0.33 <= high for low, high in (wilson(rate, 200) for rate in rates)]
    assert sum(covered) / 4000 == pytest.approx(0.95, abs=0.015)


def test_figures_without_any_verdict():
    figures = summarize([[Judgement(0, Verdict(None, "unreadable"))]])
    assert figures["win_rate"] is figures["first_won"] is figures["win_rate_low"] is None
    assert figures["num_no_verdict"] == 1
