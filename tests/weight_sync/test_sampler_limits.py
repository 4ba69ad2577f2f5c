"""The run's own first steps as the measure of what sampler and trainer may differ by."""

from __future__ import annotations

import functools
import logging
import math

import pytest
import torch

from rloo_fast.checkpoint.files import load_state
from rloo_fast.weight_sync.sampler_check import SamplerMismatch
from rloo_fast.weight_sync.sampler_limits import COARSE, EXACT, SamplerLimits
from tests.step.test_update import train
from tests.weight_sync.test_sampler_check import make_batch, make_check, sample_with

BF16 = {"dtype": torch.bfloat16}
FIRST = [0.02, 0.03, 0.02, 0.025, 0.03]


def limits_after(means, rounding=COARSE, **set_by_user) -> SamplerLimits:
    limits = SamplerLimits(rounding, **set_by_user)
    for mean in means:
        limits.add(mean)
    return limits


def judge(check, mean, trains=True):
    check.judge(check.columns(make_batch([[mean], [-mean]])), "here", trains=trains)


# --- where the limits lie


@pytest.mark.parametrize(
    ("rounding", "means", "warn", "stop"),
    [
        (COARSE, FIRST[:4], 0.05, 0.5),  # not known yet
        (COARSE, FIRST, 0.06, 0.2),
        (COARSE, [*FIRST, 9.0, 0.001], 0.06, 0.2),  # only the first count
        (COARSE, [0.02, 0.03, 0.3, 0.02, 0.03], 0.06, 0.2),  # one odd step
        (COARSE, [0.3, 0.03, 0.04, 0.02, 0.03], 0.09, 0.3),  # the first of all
        (COARSE, [0.01, 0.05, 0.05, 0.05, 0.05], 0.03, 0.1),  # stale since the second
        (COARSE, [0.0] * 5, 0.03, 0.1),  # a policy that is certain at first
        (COARSE, [0.06] * 5, 0.18, 0.6),
        (COARSE, [0.061] * 5, 0.05, 0.5),  # no healthy engine: no excuse
        (COARSE, [0.4] * 5, 0.05, 0.5),
        (EXACT, [1e-6] * 4, 1e-3, 1e-2),
        (EXACT, [1e-6] * 5, 3e-4, 1e-3),
        (EXACT, [1e-3] * 5, 3e-3, 1e-2),  # TF32 on a GPU
        (EXACT, [0.009] * 5, 1e-3, 1e-2),
    ],
    ids=str,
)
def test_three_and_ten_times_the_first_steps_within_bounds(rounding, means, warn, stop):
    limits = limits_after(means, rounding)
    assert (limits.warn, limits.stop) == (pytest.approx(warn), pytest.approx(stop))


@pytest.mark.parametrize("means", [[], FIRST, [0.4] * 5], ids=["new", "known", "beyond"])
def test_what_the_user_sets_stays(means):
    limits = limits_after(means, warn=0.002, stop=0.0)
    assert (limits.warn, limits.stop) == (0.002, 0.0)
    assert limits_after(means, warn=0.002).stop == limits_after(means).stop
    assert limits_after(means, stop=0.002).warn == limits_after(means).warn


def test_no_limit_is_beyond_bounds_whatever_the_first_steps():
    generator = torch.Generator().manual_seed(0)
    for rounding in (EXACT, COARSE):
        for _ in range(200):
            means = (10 ** (torch.rand(5, generator=generator) * 8 - 7)).tolist()
            limits = limits_after(means, rounding)
            assert 3 * rounding.smallest <= limits.warn <= 3 * rounding.largest
            assert 10 * rounding.smallest <= limits.stop <= 10 * rounding.largest


# --- what is judged by them


def test_after_the_first_steps_a_gap_of_ten_times_theirs_stops_a_run_in_bf16(tmp_path, caplog):
    """Where 0.4 was let pass, and 0.055 warned about."""
    check = make_check(tmp_path, **BF16)
    for mean in FIRST:
        judge(check, mean)
    for mean in (0.055, 0.04, 0.055):
        judge(check, mean)
    assert "differ between rollout engine" not in caplog.text
    judge(check, 0.07)
    assert "differ between rollout engine" in caplog.text
    assert "logp_diff_warn (now 0.06)" in caplog.text
    with pytest.raises(SamplerMismatch, match=r"logp_diff_stop \(now 0\.2; 0: never stop\)"):
        judge(check, 0.21)


def test_evaluations_are_judged_but_are_no_measure(tmp_path):
    check = make_check(tmp_path, **BF16)
    for _ in range(9):
        judge(check, 0.03, trains=False)
    assert check.limits.first == []
    for mean in FIRST:
        judge(check, mean)
    with pytest.raises(SamplerMismatch):
        judge(check, 0.21, trains=False)


def test_a_step_without_tokens_is_no_measure(tmp_path):
    check = make_check(tmp_path, **BF16)
    check.judge(check.columns(make_batch([[], []])), "here", trains=True)
    check.judge({}, "here", trains=True)
    check.judge(check.columns(make_batch([[0.1]], [[math.nan]])), "here", trains=True)
    assert check.limits.first == []


def test_what_top_p_explains_is_no_part_of_the_measure(tmp_path):
    check = make_check(tmp_path, top_p=0.5, **BF16)
    for _ in range(5):
        check.judge(check.columns(make_batch([[0.6, -0.04]])), "here", trains=True)
    assert check.limits.first == [pytest.approx(0.02)] * 5


# --- what is said


def said_by(caplog, means, **kwargs):
    caplog.clear()
    with caplog.at_level(logging.INFO):
        limits_after(means, **kwargs)
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_the_limits_are_said_once(caplog):
    [(level, sentence)] = said_by(caplog, FIRST * 3)
    assert level == "INFO"
    assert "warns at 0.06, stops at 0.2: 3 and 10 times what the first 5 steps" in sentence
    [(level, sentence)] = said_by(caplog, [0.3] * 9)
    assert level == "WARNING"
    assert "differ by 0.3 per token, more than a healthy engine's (0.06)" in sentence
    assert "warns at 0.05, stops at 0.5" in sentence
    assert said_by(caplog, FIRST[:4]) == []
    assert said_by(caplog, FIRST, warn=1.0, stop=2.0) == []
    assert said_by(caplog, FIRST, is_main_process=False) == []


def test_a_resumed_run_has_the_same_limits_and_says_them(caplog):
    whole = limits_after(FIRST)
    resumed = SamplerLimits(COARSE)
    with caplog.at_level(logging.INFO):
        resumed.load_state_dict(limits_after(FIRST[:2]).state_dict())
        for mean in FIRST[2:]:
            resumed.add(mean)
    assert (resumed.warn, resumed.stop) == (whole.warn, whole.stop)
    assert "warns at 0.06" in caplog.text
    with caplog.at_level(logging.INFO):
        caplog.clear()
        again = SamplerLimits(COARSE)
        again.load_state_dict(whole.state_dict())
        again.load_state_dict(whole.state_dict())  # a step that failed gives it back
    assert len(caplog.records) == 1
    again.load_state_dict({})  # an older checkpoint
    assert (again.warn, again.stop) == (0.05, 0.5)


# --- with a trainer


def test_the_measure_is_part_of_a_checkpoint(tmp_path):
    def sampling_itself(trainer):
        sample_with(trainer, trainer.model)

    whole = train(
        tmp_path, before=sampling_itself, max_steps=6, save_strategy="steps", save_steps=3
    )
    checkpoint = str(tmp_path / "checkpoint-3")
    assert len(load_state(checkpoint, 0)["first_logp_diffs"]) == 3

    def resumed(trainer):
        sampling_itself(trainer)
        trainer.train = functools.partial(trainer.train, resume_from_checkpoint=checkpoint)

    again = train(tmp_path / "again", before=resumed, max_steps=6)
    assert again.sampler_check.limits.first == whole.sampler_check.limits.first
    assert len(set(again.sampler_check.limits.first)) > 1


def test_a_step_that_fails_leaves_no_measure_behind(tmp_path):
    """Its first generation batch was judged, its second ended the run."""

    def before(trainer):
        sample_with(trainer, trainer.model)
        real, calls = trainer.rollouts.engine._generate, []

        def generate(*args):
            rollout = real(*args)
            calls.append(1)
            if len(calls) == 4:  # the second of the second step
                rollout.logps[:] = [[x - 1 for x in row] for row in rollout.logps]
            return rollout

        trainer.rollouts.engine._generate = generate

    fields = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    with pytest.raises(SamplerMismatch):
        train(tmp_path, before=before, max_steps=3, steps_per_generation=1, **fields)
    state = load_state(str(tmp_path / "checkpoint-1"), 0)
    assert len(state["first_logp_diffs"]) == 2
