"""A run does not depend on torch.set_default_dtype, and a model of any float dtype trains."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.reports.metric_names import is_timing
from tests.support.tiny import make_model, make_tokenizer

pytestmark = pytest.mark.run

FIELDS = {
    "sampled": {"beta": 0.05},
    "reused, normalised": {
        "beta": 0.05, "num_iterations": 2, "normalize_advantages": True,
        "truncated_importance_sampling": "token", "whiten_rewards": True,
    },
    "KL in the loss": {"beta": 0.05, "loss": "grpo", "eval_strategy": "steps", "eval_steps": 1},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _float32_again():
    yield
    torch.set_default_dtype(torch.float32)


def logs_of_a_run(tmp_path, model, default, **fields):
    rows = Dataset.from_dict({"prompt": ["w1", "w2", "w3", "w4"]})
    torch.set_default_dtype(default)
    trainer = RLOOTrainer(
        model,
        lambda completions, **_: [float(sum(map(ord, text)) % 5) for text in completions],
        RLOOConfig(
            str(tmp_path), per_device_train_batch_size=4, num_generations=2, max_steps=2,
            max_completion_length=6, logging_steps=1, report_to="none", save_strategy="no",
            use_cpu=True, bf16=False, disable_tqdm=True, learning_rate=1e-3, **fields,
        ),
        rows,
        rows,
        processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.train()
    logs = trainer.state.log_history
    return [
        {k: v for k, v in log.items() if not is_timing(k)}
        for log in logs
        if "train_loss" not in log
    ]


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", FIELDS)
def test_the_default_dtype_changes_no_number(name, default, tmp_path):
    expected = logs_of_a_run(tmp_path / "a", make_model(), torch.float32, **FIELDS[name])
    found = logs_of_a_run(tmp_path / "b", make_model(), default, **FIELDS[name])
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        if "loss" in b:  # summed between two logs by transformers, in the default dtype
            assert a.pop("loss") == pytest.approx(b.pop("loss"), rel=2**-8, abs=1e-6)
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_dtype_trains(dtype, tmp_path):
    logs = logs_of_a_run(tmp_path, make_model().to(dtype), torch.float32, beta=0.05)
    assert [log["step"] for log in logs] == [1, 2]
    assert logs[0]["kl"] == pytest.approx(0, abs=1e-6)
