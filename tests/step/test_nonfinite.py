"""Gradients that are not finite change nothing, and too many of them end the run."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy
import pytest
import torch
from transformers import TrainerCallback

from rloo_fast.step.callbacks import StepCallback
from tests.support.interrupted import Crash, crash_in, weights_of
from tests.support.kill_resume import make_trainer


def plant(trainer: Any, steps: set[int], value: float = float("nan")) -> None:
    """One gradient entry of the trainer's model becomes `value` in these steps."""

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        if trainer.state.global_step + 1 in steps:
            grad = grad.clone()
            grad[0] = value
        return grad

    trainer.model.model.norm.weight.register_hook(spoil)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(tmp_path, value, max_grad_norm):
    trainer = make_trainer(tmp_path, max_grad_norm=max_grad_norm, weight_decay=0.1)
    plant(trainer, {3, 5}, value)
    kept: dict[int, Any] = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            assert optimizer is not None
            moments = [t.clone() for s in optimizer.state.values() for t in s.values()]
            kept[state.global_step] = [*weights_of(trainer).values(), *moments]

    trainer.add_callback(Keep())
    trainer.train()

    assert trainer.nonfinite.num_skipped == 2
    same = [
        all(torch.equal(a, b) for a, b in zip(kept[step - 1], kept[step], strict=True))
        for step in range(2, 7)
    ]
    assert same == [False, True, False, True, False]


def test_skipped_steps_leave_the_logged_loss_of_the_run_finite(tmp_path):
    trainer = make_trainer(tmp_path)
    updater = trainer.update.updater
    attempt = updater.attempt

    def nan_at_3(*args: Any) -> Any:
        result = attempt(*args)
        if trainer.state.global_step != 2:
            return result
        return dataclasses.replace(result, loss=result.loss * float("nan"))

    updater.attempt = nan_at_3

    assert numpy.isfinite(trainer.train().training_loss)


def test_too_many_such_steps_in_a_row_end_the_run(tmp_path):
    trainer = make_trainer(tmp_path, max_nonfinite_steps=2)
    plant(trainer, {2, 4, 5})

    with pytest.raises(FloatingPointError, match="2 steps in a row had a loss or gradient that is"):
        trainer.train()

    assert trainer.state.global_step == 4
    assert trainer.nonfinite.num_skipped == 3


def test_a_resumed_run_goes_on_counting_them(tmp_path):
    settings = {"max_nonfinite_steps": 3, "save_steps": 4}
    trainer = make_trainer(tmp_path, **settings)
    plant(trainer, {3, 4, 5})
    trainer.add_callback(crash_in(5))
    with pytest.raises(Crash):
        trainer.train()
    resumed = make_trainer(tmp_path, **settings)
    plant(resumed, {3, 4, 5})

    with pytest.raises(FloatingPointError):
        resumed.train(resume_from_checkpoint=True)

    assert resumed.state.global_step == 4


def test_fp16_overflows_end_the_run_only_once_the_loss_scale_is_down(tmp_path):
    trainer = make_trainer(tmp_path, max_nonfinite_steps=1)
    callbacks = trainer.callback_handler.callbacks
    (callback,) = [c for c in callbacks if isinstance(c, StepCallback)]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # pyright: ignore
    trainer.accelerator.scaler = scaler
    trainer.model_wrapped, trainer.nonfinite.grad_norm = trainer.model, float("inf")
    callback.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
    scaler._scale = torch.ones(())

    with pytest.raises(FloatingPointError):
        callback.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
