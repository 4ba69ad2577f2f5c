"""What ends a run costs none of its steps."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rloo_fast import RLOOTrainer
from rloo_fast.rollout.engine import EngineError
from rloo_fast.step import collect
from tests.support.interrupted import names
from tests.support.kill_resume import make_trainer


def test_the_steps_before_a_broken_reward_are_saved(tmp_path):
    trainer: Any = make_trainer(tmp_path, save_strategy="no")
    rewards, calls = trainer.rewards.functions[0], []
    function = rewards.function

    def one_too_few(**keywords):
        calls.append(1)
        values = function(**keywords)
        return values[1:] if len(calls) == 3 else values

    rewards.function = one_too_few
    with pytest.raises(ValueError, match="returned") as caught:
        trainer.train()
    step = trainer.state.global_step
    assert step > 0
    assert f"checkpoint-{step} holds the {step} steps done" in caught.value.__notes__[0]
    assert names(tmp_path) == [f"checkpoint-{step}"]


def saved_steps(trainer: Any, error: type[Exception], match: str) -> list[str]:
    """Checkpoints of a run that `error` ended, which all processes have heard of."""
    with pytest.raises(error, match=match):
        trainer.train()
    assert trainer.collector.failed
    return names(Path(trainer.args.output_dir))


def test_an_engine_that_cannot_sleep_ends_all_processes(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="no")

    engine, done = trainer.rollouts.engine, []

    def sleep(level: int) -> None:
        done.append(level)
        if len(done) == 3:
            raise EngineError("it does not sleep")

    engine._sleep = sleep
    assert saved_steps(trainer, EngineError, "does not sleep") == ["checkpoint-2"]


def test_trajectories_that_cannot_be_rows_end_all_processes(tmp_path, monkeypatch):
    def rollout_func(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        count = len(prompts)
        return {
            "prompt_ids": [[5] for _ in range(count)],
            "completion_ids": [[6 + i, 7] for i in range(count)],
            "logprobs": None,
            "env_mask": [[1, 1]] * count,
        }

    made = partial(RLOOTrainer, rollout_func=rollout_func)
    monkeypatch.setattr("tests.support.kill_resume.RLOOTrainer", made)
    trainer = make_trainer(tmp_path, save_strategy="no")
    rows = collect.trajectory_rows

    def fails(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 2:
            raise ValueError("they have nothing in common")
        return rows(*args, **kwargs)

    monkeypatch.setattr(collect, "trajectory_rows", fails)
    assert saved_steps(trainer, ValueError, "nothing in common") == ["checkpoint-2"]
