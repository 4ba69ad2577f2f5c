"""view_mib in a run: its tokens are written as the run computed them, and it stays the same run."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from datasets import Dataset

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.reports.metric_names import is_timing
from rloo_fast.reports.metrics_file import read_metrics
from rloo_fast.reports.view_format import FOLDER, RUN, step_files
from rloo_fast.viewer.run import open_runs
from tests.support.launch import run_worker_processes
from tests.support.tiny import make_model, make_tokenizer


def reward(completion_ids, **_):
    return [sum(ids) / 100 for ids in completion_ids]


def train(path, resume=None, **settings):
    args = RLOOConfig(
        str(path),
        **{
            "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6,
            "max_steps": 3, "learning_rate": 1e-2, "beta": 0.1, "view_mib": 1, "logging_steps": 1,
            "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
            "gradient_checkpointing": False, **settings,
        },
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(16)]})
    trainer = RLOOTrainer(make_model(), reward, args, data, processing_class=make_tokenizer())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def read(path):
    (run,) = open_runs([path], ["it"], ["it"])
    return run, run.require_steps()


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_iterations": 2}, {"loss": "dapo"}, {"layout": "padded"}, {"dynamic_sampling": True}],
    ids=["one pass", "two passes", "kl in the loss", "padded", "groups replaced"],
)
def test_tokens_add_up_to_what_the_run_logged(tmp_path, settings):
    train(tmp_path, **settings)
    _, steps = read(tmp_path)
    logs = {row["step"]: row for row in read_metrics(tmp_path) if "reward" in row}
    written = [summary["step"] for summary in steps.summaries()]
    assert written == ([1, 3] if "num_iterations" in settings else [1, 2, 3])
    for step in written:
        rows = steps.rows(step)
        assert np.mean([row["reward"] for row in rows]) == pytest.approx(logs[step]["reward"])
        tokens = [steps.tokens(step, number) for number in range(len(rows))]
        every = {name: np.concatenate([one[name] for one in tokens]) for name in tokens[0]}
        assert every["entropy"].astype(float).mean() == pytest.approx(
            logs[step]["entropy"], rel=1e-2
        )
        assert every["kl"].astype(float).mean() == pytest.approx(
            logs[step]["kl"], rel=2e-2, abs=1e-4
        )
        assert np.abs(every["sampler_diff"].astype(float)).max() < 1e-4
        for row, one in zip(rows, tokens, strict=True):
            text = "".join(one["text"])
            assert re.sub("<(eos|pad|unk)>", "", text).split() == row["completion"].split()
            assert (row["end"] == "stop") == text.endswith("<eos>")
            assert len(one["logp"]) == row["length"]


def test_all_generation_batches_of_a_step_are_kept(tmp_path):
    train(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2,
          steps_per_generation=1, max_steps=2)  # fmt: skip
    _, steps = read(tmp_path)
    logs = {row["step"]: row for row in read_metrics(tmp_path) if "reward" in row}
    for step in (1, 2):
        rows = steps.rows(step)
        assert [row["group"] for row in rows] == [0] * 4 + [1] * 4
        assert np.mean([row["reward"] for row in rows]) == pytest.approx(logs[step]["reward"])


def test_a_run_that_is_looked_at_is_the_same_run(tmp_path):
    train(tmp_path / "looked", view_mib=1)
    train(tmp_path / "not", view_mib=0)
    looked, unseen = (
        [{k: v for k, v in row.items() if not is_timing(k)} for row in read_metrics(tmp_path / n)]
        for n in ("looked", "not")
    )
    for row in (*looked, *unseen):
        row.pop("train_runtime", None)
        row.pop("eps", None)
    assert looked == unseen
    assert not (tmp_path / "not" / FOLDER).exists()


def test_a_resumed_run_has_every_step_once(tmp_path):
    train(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    train(tmp_path, max_steps=4, resume=str(tmp_path / "checkpoint-1"))
    run, steps = read(tmp_path)
    assert [summary["step"] for summary in steps.summaries()] == [1, 2, 3, 4]
    about = json.loads((tmp_path / FOLDER / RUN).read_text())
    assert (about["resumed_from"], about["max_steps"]) == (1, 4)
    assert run.overview()["status"] == "finished"
    assert about["config"]["beta"] == 0.1
    assert about["environment"]["torch"] == torch.__version__


def test_masked_rows_have_tokens_and_no_values(tmp_path):
    train(tmp_path, max_completion_length=3, mask_truncated_completions=True, max_steps=1)
    _, steps = read(tmp_path)
    for number, row in enumerate(steps.rows(1)):
        tokens = steps.tokens(1, number)
        assert len(tokens["text"]) == row["length"]
        if row["end"] == "length":
            assert {*tokens.get("logp", [None])} == {None}


def test_conversations_are_kept_as_such(tmp_path):
    args = RLOOConfig(
        str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=4,
        max_steps=1, view_mib=1, save_strategy="no", report_to="none", use_cpu=True,
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    prompt = [{"role": "user", "content": "w1 w2"}]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}assistant"
    data = Dataset.from_list([{"prompt": prompt}] * 4)
    RLOOTrainer(make_model(), reward, args, data, processing_class=tokenizer).train()
    _, steps = read(tmp_path)
    row = steps.rows(1)[0]
    messages = json.loads(row["messages"])
    assert messages["prompt"] == prompt
    assert messages["completion"][0]["role"] == "assistant"
    assert row["prompt"] == "user: w1 w2"


def test_a_step_beyond_the_share_keeps_whole_groups(tmp_path, monkeypatch):
    monkeypatch.setattr("rloo_fast.reports.view.SHARE_OF_STEP", (1 << 20) // (5 * 6 * 12))
    train(tmp_path, max_steps=1, per_device_train_batch_size=16)
    _, steps = read(tmp_path)
    rows = steps.rows(1)
    assert steps.summaries()[0]["num_rows"] == 16
    assert 4 <= len(rows) < 16
    assert len(rows) % 4 == 0
    assert list(step_files(tmp_path)) == [1]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_write_what_one_writes(tmp_path):
    for processes in (1, 2):
        out = tmp_path / str(processes)
        done = run_worker_processes("view_worker", str(out), processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    (_, one), (_, two) = read(tmp_path / "1"), read(tmp_path / "2")
    assert [summary["step"] for summary in two.summaries()] == [1, 2]
    for step in (1, 2):
        for number, (row, other) in enumerate(zip(one.rows(step), two.rows(step), strict=True)):
            numbers = {k: v for k, v in row.items() if isinstance(v, float)}
            assert {k: other[k] for k in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-3)
            assert other.keys() == row.keys()
            assert {k: other[k] for k in row.keys() - numbers} == {
                k: row[k] for k in row.keys() - numbers
            }
            tokens, others = one.tokens(step, number), two.tokens(step, number)
            assert tokens.pop("text") == others.pop("text")
            assert tokens.pop("sampler_diff") != []
            for name, values in tokens.items():
                assert others[name] == pytest.approx(values, rel=5e-3, abs=1e-3)
