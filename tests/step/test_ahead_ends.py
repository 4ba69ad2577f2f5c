"""Runs that sample ahead and are killed, or meet a reward that does not come back."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.step.test_ahead import STEPS, ahead
from tests.support import kill_ahead
from tests.support.kill_ahead import PROMPTS


def stuck_on_one_prompt(completions: list[str], prompts: list[str], **_: Any) -> list[float]:
    time.sleep(600 * (PROMPTS[3] in prompts))
    return [float(len(text)) for text in completions]


@pytest.mark.slow
def test_a_killed_run_trains_every_prompt_once():
    cases = ["--cases", "N=0", "N=1", "N=4", "N=1 dynamic"]
    assert kill_ahead.main(["--kills", "1", "--seed", "3", *cases]) == 0


@pytest.mark.slow
def test_completions_whose_reward_does_not_come_back_are_left_out(tmp_path):
    trainer = ahead(
        tmp_path,
        2,
        stuck_on_one_prompt,
        shuffle_dataset=False,
        reward_processes=1,
        reward_timeout_s=2.0,
        reward_over_limit="none",
        max_steps=4,
    )
    trainer.train()
    assert trainer.state.global_step == 4 < STEPS
    unscored = [batch.scores.isnan().any() for batch in trainer.trained]
    assert any(unscored)
    assert not all(unscored)
