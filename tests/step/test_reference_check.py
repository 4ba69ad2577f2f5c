"""A run stops in its first step unless the policy starts as its reference."""

from __future__ import annotations

import logging

import pytest
import torch

from rloo_fast.step.reference_check import ReferenceCheck, ReferenceMismatch
from tests.support.kill_resume import make_trainer


def check(**settings):
    defaults = {"beta": 0.1, "stops": True, "has_dropout": False}
    where = {"dtype": torch.float32, "device": torch.device("cpu")}
    return ReferenceCheck(**{**defaults, **where, **settings})


def rows(*kl, tokens=10.0):
    return {"kl": torch.tensor(kl), "tokens": torch.full((len(kl),), tokens)}


def test_both_signs_count_and_a_row_that_was_not_run_does_not():
    with pytest.raises(ReferenceMismatch, match=r"is 0\.02 nats per token, .*set beta=0"):
        check().judge(rows(0.2, -0.2, float("nan")), 0)


def test_rounding_grows_with_the_length_and_the_type():
    check().judge(rows(9e-4, tokens=10.0), 0)
    check(dtype=torch.bfloat16).judge(rows(0.5, tokens=10.0), 0)
    with pytest.raises(ReferenceMismatch):
        check(dtype=torch.bfloat16).judge(rows(2.0, tokens=10.0), 0)


NOT_JUDGED = {
    "no reference": ({"beta": 0.0}, 0, {}),
    "a resumed run": ({}, 3, {}),
    "noise of dropout": ({"has_dropout": True}, 0, {}),
}


@pytest.mark.parametrize("case", NOT_JUDGED)
def test_it_is_not_judged(case):
    settings, step, _ = NOT_JUDGED[case]
    check(**settings).judge(rows(5.0), step)


def test_with_dropout_a_pass_without_it_is_judged():
    with pytest.raises(ReferenceMismatch):
        check(has_dropout=True).judge({**rows(5.0), "old_entropy": torch.zeros(1)}, 0)


def test_only_the_first_step_is_judged():
    judged = check()
    judged.judge(rows(0.0), 0)
    judged.judge(rows(5.0), 0)  # of a second call of train()


def test_it_warns_where_it_is_not_to_stop(caplog):
    with caplog.at_level(logging.WARNING):
        check(stops=False).judge(rows(5.0), 0)
    assert "the reference is not the policy as it was passed in" in caplog.text


def test_weights_changed_after_the_trainer_was_made_stop_the_run(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.1)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    with pytest.raises(ReferenceMismatch, match="change them before"):
        trainer.train()
    assert trainer.state.global_step == 0
