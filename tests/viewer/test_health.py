"""Checks of a run: each says ok, worry or unknown, by lines that it can name."""

from __future__ import annotations

import pytest

from rloo_fast.viewer.health import CHECKS, health

GOOD = {
    "reward": 0.5, "rewards/f/mean": 0.5,
    "sampling/logp_diff_judged": 1e-6, "frac_reward_zero_std": 0.1, "kl": 0.05, "entropy": 1.0,
    "completions/clipped_ratio": 0.02, "grad_norm": 0.7, "completions/mean_length": 100.0,
}  # fmt: skip
STEP = {"logp_diff_warn": 3e-4, "logp_diff_stop": 1e-3, "frac_repeated": 0.05}
CONFIG = {"max_grad_norm": 1.0}


def states(change=None, step=None, config=CONFIG):
    rows = [{"step": i, **GOOD} for i in range(1, 20)]
    rows += [{"step": i, **GOOD, **(change or {})} for i in range(20, 30)]
    steps = [{"step": 29, **STEP, **(step or {})}]
    found = health(rows, steps, config)
    return {check["key"]: check["state"] for check in found}


def test_a_healthy_run_has_no_worry():
    assert {*states().values()} == {"ok"}


@pytest.mark.parametrize(
    "change",
    [
        {"sampling/logp_diff_judged": 4e-4}, {"frac_reward_zero_std": 0.8}, {"kl": 0.9},
        {"entropy": 0.05}, {"entropy": 3.5}, {"completions/clipped_ratio": 0.4},
        {"grad_norm": 30.0}, {"completions/mean_length": 30.0}, {"completions/mean_length": 170.0},
    ],
    ids=lambda change: "{}={}".format(*next(iter(change.items()))),
)  # fmt: skip
def test_what_goes_wrong_is_the_one_worry(change):
    worries = [key for key, state in states(change).items() if state == "worry"]
    assert worries == list(change)


def test_texts_that_repeat_over_prompts_are_a_worry():
    assert states(step={"frac_repeated": 0.9})["frac_repeated"] == "worry"


def parts(reward, part):
    rows = [
        {"step": i, "reward": reward[0 if i < 9 else 1], "rewards/f/mean": part[0 if i < 9 else 1]}
        for i in range(20)
    ]
    found = next(check for check in health(rows, [], {}) if check["key"] == "parts")
    assert found["series"] == ["reward", "rewards/f/mean"]
    return found["state"]


def test_a_part_that_falls_while_the_reward_rises_is_a_worry():
    assert parts(reward=(1.0, 3.0), part=(0.8, 0.1)) == "worry"
    assert parts(reward=(1.0, 0.5), part=(0.8, 0.1)) == "ok"
    assert parts(reward=(1.0, 3.0), part=(0.8, 0.7)) == "ok"
    assert parts(reward=(1.0, 3.0), part=(-0.8, -0.1)) == "ok"


def test_one_odd_log_is_no_worry():
    rows = [{"step": i, **GOOD} for i in range(1, 20)]
    rows[-1]["kl"] = 9.0
    assert next(c for c in health(rows, [STEP], CONFIG) if c["key"] == "kl")["state"] == "ok"


def test_what_is_not_logged_is_not_known():
    found = health([{"step": 1, "reward": 1.0}], [], {})
    assert {check["state"] for check in found} == {"unknown"}
    assert states(config={"max_grad_norm": None})["grad_norm"] == "unknown"


def test_every_check_says_why_and_where_its_line_comes_from():
    for check in CHECKS:
        assert len(check.why) > 80
        assert "rule of thumb" in check.why or "rules of thumb" in check.why or check.key in (
            "sampling/logp_diff_judged", "grad_norm",
        )  # fmt: skip
