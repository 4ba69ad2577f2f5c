"""What is read of a run: steps, tokens, prompts, curves, its state."""

from __future__ import annotations

import json
import os
import socket

import pandas as pd
import pytest

from benchmarks.viewer.made_runs import lock
from rloo_fast.reports.completions import completions_dataframe, mark
from rloo_fast.reports.completions_file import CompletionsWriter
from rloo_fast.reports.metrics_file import MetricsWriter
from rloo_fast.reports.view_format import prompt_id, step_files
from rloo_fast.viewer.curves import curves, thinned
from rloo_fast.viewer.run import open_runs
from rloo_fast.viewer.status import seconds_left, status
from rloo_fast.viewer.steps import KeptSteps, StepsOfCSV, kept_steps
from tests.viewer.conftest import EVIL, make, opened


def test_a_step_has_its_groups_side_by_side(finished):
    rows = KeptSteps(finished).rows(3)
    assert [(r["group"], r["sample"]) for r in rows] == [(g, s) for g in range(4) for s in range(4)]
    assert [r["completion"] for r in rows[:4]] == [*EVIL]
    assert rows[5]["completion"] == "answer 3 of sample 1"
    for group in range(4):
        own = rows[4 * group : 4 * group + 4]
        mean = sum(r["reward"] for r in own) / 4
        for row in own:
            others = (4 * mean - row["reward"]) / 3
            assert row["advantage"] == pytest.approx(row["reward"] - others, abs=1e-4)


def test_tokens_are_the_completion(finished):
    steps = KeptSteps(finished)
    for number, row in enumerate(steps.rows(2)):
        tokens = steps.tokens(2, number)
        assert "".join(tokens["text"]) == row["completion"]
        assert {len(values) for values in tokens.values()} == {row["length"]}
        assert max(tokens["logp"]) <= 0
    with pytest.raises(ValueError, match="has 16 rows, got row 16"):
        steps.tokens(2, 16)


def test_a_step_that_is_not_kept_is_said(finished):
    with pytest.raises(ValueError, match="step 77 of first is not kept"):
        KeptSteps(finished).rows(77)


def test_a_prompt_is_followed_over_the_run(finished):
    steps = KeptSteps(finished)
    wanted = steps.rows(2)[4]["prompt_id"]
    found = steps.with_prompt(wanted)
    assert [step for step, _ in found] == [2]
    assert {row["prompt_id"] for _, rows in found for row in rows} == {wanted}
    assert steps.with_prompt("nothing") == []


def test_search_finds_the_newest_first_and_takes_text_as_text(finished):
    steps = KeptSteps(finished)
    hits, is_all = steps.search("ANSWER 6 OF")
    assert is_all
    assert [(hit["step"], hit["group"]) for hit in hits[:4]] == [(6, 1)] * 4
    assert len(steps.search("<SCRIPT>")[0]) == 6 * 2
    assert steps.search(".*")[0] == []


def test_a_damaged_file_hides_its_step_alone(tmp_path):
    make(tmp_path, steps=3)
    step_files(tmp_path)[2].write_bytes(b"not parquet")
    assert [s["step"] for s in KeptSteps(tmp_path).summaries()] == [1, 3]


def test_new_steps_appear_and_dropped_ones_go(tmp_path):
    made = make(tmp_path, steps=2)
    steps = KeptSteps(tmp_path)
    assert [s["step"] for s in steps.summaries()] == [1, 2]
    made.step(3)
    step_files(tmp_path)[1].unlink()
    assert [s["step"] for s in steps.summaries()] == [2, 3]


def test_completions_csv_is_read_in_the_same_words(tmp_path):
    MetricsWriter(tmp_path).write(1, {"reward": 1.0})
    writer = CompletionsWriter(tmp_path)
    for step in (1, 2):
        said = [f"a {step}", EVIL[0], "c\nd", 'e "f"']
        rewards = {"length": [1.0, 2.0, 3.0, None]}
        frame = completions_dataframe(["p", "p", "q", "q"], said, rewards, [0.1] * 4, step)
        writer.write(mark(frame, "train", step - 1, 4))
    writer.write(mark(pd.DataFrame(frame), "eval", 2, 4))
    steps = kept_steps(tmp_path)
    assert isinstance(steps, StepsOfCSV)
    assert [s["step"] for s in steps.summaries()] == [1, 2]
    rows = steps.rows(2)
    assert [(r["group"], r["sample"], r["reward"]) for r in rows] == [
        (0, 0, 1.0), (0, 1, 2.0), (1, 0, 3.0), (1, 1, None),
    ]  # fmt: skip
    assert rows[1]["completion"] == EVIL[0]
    assert steps.with_prompt(prompt_id("q"))[0][1] == rows[2:]
    assert [hit["step"] for hit in steps.search("C\nD")[0]] == [2, 1]


# Curves


def test_thinning_keeps_spikes_and_ends():
    values = [0.0] * 10_000
    values[3333], values[7777] = 5.0, -5.0
    kept = thinned(values, 500)
    assert len(kept) <= 500
    assert {0, 3333, 7777, 9999} <= {*kept}
    assert kept == sorted(kept)
    assert thinned([1.0, 2.0], 500) == [0, 1]


def test_curves_know_steps_tokens_and_seconds():
    rows = [
        {"step": 2, "reward": 0.5, "num_tokens": 100, "step_time": 3.0},
        {"step": 2, "eval_reward": 0.25, "eval_runtime": 1.0},
        {"step": 4, "reward": None, "num_tokens": 220, "step_time": 4.0},
    ]
    found = curves(rows)
    assert found["x"] == {"step": [2, 2, 4], "num_tokens": [100, 100, 220], "time": [6, 6, 14]}
    assert found["series"]["reward"] == [[0], [0.5]]
    assert found["series"]["eval_reward"] == [[1], [0.25]]


# State


def test_a_run_is_running_while_its_process_lives(tmp_path):
    rows = [{"step": 5, "step_time": 2.0}]
    assert status(tmp_path, rows) == "stopped"
    lock(tmp_path, os.getpid())
    assert status(tmp_path, rows) == "running"
    lock(tmp_path, 2**22 + 1)  # more than any process' number
    assert status(tmp_path, rows) == "stopped"
    assert status(tmp_path, [*rows, {"step": 5, "train_loss": 0.0}]) == "finished"
    (tmp_path / ".rloo_lock").write_text("")
    assert status(tmp_path, []) == "empty"


def test_a_run_of_another_machine_lives_as_long_as_it_writes(tmp_path):
    (tmp_path / ".rloo_lock").write_text(f"process 1 on not-{socket.gethostname()}\n")
    assert status(tmp_path, [{"step": 1}]) == "running"
    os.utime(tmp_path / ".rloo_lock", (1, 1))
    assert status(tmp_path, [{"step": 1}]) == "stopped"


def test_time_left_goes_by_the_newest_steps():
    rows = [{"step": i, "step_time": 100.0 if i < 20 else 2.0} for i in range(1, 41)]
    assert seconds_left(rows, 100) == 120.0
    assert seconds_left(rows, None) is None
    assert seconds_left([], 100) is None


# Runs


def test_a_folder_without_a_run_is_refused_by_its_name(tmp_path):
    with pytest.raises(ValueError, match="expected the output_dir of a run"):
        open_runs([tmp_path], ["x"], ["x"])
    with pytest.raises(ValueError, match="is no directory"):
        open_runs([tmp_path / "gone"], ["x"], ["x"])


def test_a_run_says_what_it_is(finished):
    (run,) = opened(finished)
    about = run.overview()
    assert (about["status"], about["step"], about["max_steps"]) == ("finished", 6, 6)
    assert about["config"]["beta"] == 0.05
    assert "reward" in run.curves()["main"]
    assert run.curves()["titles"]["kl"] == ["KL to the reference", "nats per token"]
    assert json.dumps(about, allow_nan=False)


def test_a_run_without_completions_has_the_rest(tmp_path):
    MetricsWriter(tmp_path).write(1, {"reward": 1.0})
    (run,) = opened(tmp_path)
    assert run.summaries() == []
    assert run.overview()["config"] is None
    with pytest.raises(ValueError, match="kept no completions: train with view_mib"):
        run.require_steps()


def test_metrics_are_read_again_when_they_grow(tmp_path):
    made = make(tmp_path, steps=1)
    (run,) = opened(tmp_path)
    stamp = run.overview()["stamp"]
    made.step(2)
    assert len(run.rows) == 2
    assert run.overview()["stamp"] != stamp
