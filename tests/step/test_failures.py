"""What ends a run costs none of its steps."""

from __future__ import annotations

import pytest

from tests.support.interrupted import names
from tests.support.kill_resume import make_trainer


def test_the_steps_before_a_broken_reward_are_saved(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="no")
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
