"""SIGTERM: the step under way is finished and saved, and the resumed run is exact."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.support.interrupted import (
    BEST,
    At,
    assert_same_run,
    block_saves,
    names,
    scramble_random_numbers,
)
from tests.support.kill_resume import make_trainer


def terminate_in(step: int) -> At:
    def action(begun: int) -> None:
        if begun == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return At(action)


TERMINATED: dict[str, tuple[int, dict[str, Any]]] = {
    "mid-epoch": (4, {"logging_strategy": "epoch", "eval_strategy": "epoch"}),
    "mid-buffer": (3, {"num_iterations": 2, "logging_steps": 2}),
    "no-other-saves": (4, {"save_strategy": "no"}),
    "saves-by-epoch": (4, {"save_strategy": "epoch"}),
    "end-of-epoch": (5, {"per_device_train_batch_size": 8, "logging_strategy": "epoch"}),
    "last-step": (6, {"logging_strategy": "epoch"}),
}


@pytest.mark.parametrize("when", TERMINATED)
def test_sigterm_saves_the_running_step_and_the_resumed_run_is_exact(tmp_path, when):
    step, settings = TERMINATED[when]
    settings = {"save_steps": 100, **settings}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    stopped = make_trainer(tmp_path / "stopped", **settings)
    stopped.add_callback(terminate_in(step))
    with pytest.raises(SystemExit) as end:
        stopped.train()
    assert end.value.code == 0
    assert names(tmp_path / "stopped") == [f"checkpoint-{step}"]
    scramble_random_numbers()
    resumed = make_trainer(tmp_path / "stopped", **settings)
    resumed.train(resume_from_checkpoint=True)

    assert_same_run(resumed, whole)


def test_sigterm_keeps_its_checkpoint_beside_the_best_one(tmp_path):
    trainer = make_trainer(tmp_path, **BEST)
    trainer.add_callback(terminate_in(5))
    with pytest.raises(SystemExit):
        trainer.train()

    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5"]


def test_sigterm_exits_with_1_if_nothing_could_be_saved(tmp_path, caplog):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(block_saves(tmp_path, range(1, 9)))
    trainer.add_callback(terminate_in(2))

    with pytest.raises(SystemExit) as end:
        trainer.train()

    assert end.value.code == 1
    assert "the checkpoint of step 2 could not be saved" in caplog.text


@pytest.mark.parametrize("save_strategy", ["no", "steps"])
def test_sigterm_after_the_last_step_leaves_nothing_unsaved(tmp_path, save_strategy):
    class Late(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = make_trainer(tmp_path, save_strategy=save_strategy)
    trainer.add_callback(Late())

    if save_strategy == "no":  # the script goes on, and can save the model
        assert trainer.train().global_step == 6
    else:
        with pytest.raises(SystemExit) as end:
            trainer.train()
        assert end.value.code == 0


def test_the_former_handler_of_sigterm_is_back_after_training(tmp_path):
    former = signal.getsignal(signal.SIGTERM)
    make_trainer(tmp_path, max_steps=1).train()

    assert signal.getsignal(signal.SIGTERM) == former
