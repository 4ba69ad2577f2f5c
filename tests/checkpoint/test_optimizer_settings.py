"""A run resumed with other settings of the optimizer says which ones count, and they do."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.support.kill_resume import make_trainer

LAST = 4


def run(path: Any, resume: bool = False, **settings: Any) -> Any:
    plain = {"max_steps": LAST, "save_steps": 2, "learning_rate": 1e-3, "logging_steps": 1}
    trainer = make_trainer(path, **{**plain, **settings})
    trainer.train(resume_from_checkpoint=str(path / "checkpoint-2") if resume else None)
    return trainer


@pytest.fixture
def saved(tmp_path):
    run(tmp_path)
    return tmp_path


def rates(trainer: Any) -> dict[int, float]:
    rows = trainer.state.log_history
    return {row["step"]: row["learning_rate"] for row in rows if "learning_rate" in row}


def test_the_checkpoints_learning_rate_counts(saved, caplog):
    resumed = run(saved, resume=True, learning_rate=1e-2, weight_decay=0.1)
    assert rates(resumed)[LAST] == pytest.approx(1e-3 / LAST)
    (group,) = {g["weight_decay"] for g in resumed.optimizer.param_groups}
    assert group == 0.0
    sentence = "learning_rate is 0.01 now and was 0.001 in .*: the checkpoint's 0.001 counts"
    assert re.search(sentence, caplog.text)
    assert re.search(r"weight_decay is 0.1 now .*: the checkpoint's 0\.0 counts", caplog.text)


def test_the_schedule_of_the_resumed_run_counts(saved, caplog):
    resumed = run(saved, resume=True, lr_scheduler_type="constant_with_warmup", max_steps=6)
    assert rates(resumed)[LAST - 1] == pytest.approx(1e-3 * 2 / LAST)  # as it was left
    assert rates(resumed)[LAST] == pytest.approx(1e-3)
    assert resumed.state.global_step == 6
    sentence = "lr_scheduler_type is constant_with_warmup now and was linear in .*: constant_with"
    assert re.search(sentence, caplog.text)
    assert re.search(
        "max_steps is 6 now and was 4 in .*: 6 counts, but the first step", caplog.text
    )


def test_the_same_settings_say_nothing(saved, caplog):
    run(saved, resume=True)
    assert " counts" not in caplog.text


def test_the_logging_and_save_steps_of_now_count(tmp_path):
    """transformers' state brings those of the checkpoint."""
    run(tmp_path, logging_steps=4)
    resumed = run(tmp_path, resume=True, logging_steps=1, save_steps=3)
    assert sorted(rates(resumed)) == [3, 4]
    assert (tmp_path / "checkpoint-3").is_dir()


def test_an_optimizer_of_another_kind_is_refused(saved):
    with pytest.raises(ValueError, match=r"holds the state of optim='adamw_torch.*', which 'sgd'"):
        run(saved, resume=True, optim="sgd")


def test_a_fused_one_goes_on(saved):
    other = {"adamw_torch": "adamw_torch_fused", "adamw_torch_fused": "adamw_torch"}
    launch = json.loads((saved / "checkpoint-2" / "rloo_launch.json").read_text())
    resumed = run(saved, resume=True, optim=other[launch["optimizer"]["optim"]])
    assert resumed.state.global_step == LAST
