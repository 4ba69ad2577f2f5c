"""One line per log, and a bar on a terminal."""

import functools
import io
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from rloo_fast.reports import progress as report
from rloo_fast.reports.progress import CompactProgress, progress_line, show_lines
from tests.support.tiny import without_deepspeeds

LOGS = {
    "loss": -0.01234,
    "grad_norm": 0.512,
    "learning_rate": 1e-6,
    "reward": 0.81234,
    "reward_std": 0.2,
    "kl": 0.00123,
    "entropy": 1.434,
    "completions/mean_length": 212.4,
    "completions/clipped_ratio": 0.031,
    "throughput/completion_tokens_per_s": 12345.0,
    "step_time": 2.314,
    "completions/max_length": 512.0,
    "epoch": 0.1,
}


def test_progress_line_shows_every_metric_with_its_unit():
    assert progress_line(LOGS, step=12, max_steps=500) == (
        "step  12/500  reward 0.812 ± 0.200  kl 0.00123  entropy 1.43  length 212  clipped 3%"
        "  12.3k tok/s  2.31 s/step  0:18:49 left  lr 1e-06  loss -0.0123  grad 0.512"
    )


def test_progress_line_leaves_absent_values_out():
    line = progress_line({"reward": 0.5, "kl": None, "epoch": 1.0}, step=3, max_steps=9)
    assert line == "step 3/9  reward 0.500"


def test_progress_line_shows_a_nan_loss():
    assert progress_line({"loss": math.nan}, 3, 9) == "step 3/9  loss nan"


def test_progress_line_of_an_evaluation():
    logs = {"eval_reward": 0.7, "eval_reward_std": 0.1, "eval_accuracy": 0.65, "eval_runtime": 62.0}
    line = progress_line(logs, step=3, max_steps=9)
    assert line == "eval 3/9  accuracy 0.650  reward 0.700 ± 0.100  took 0:01:02"


def test_progress_line_of_an_evaluation_without_training():
    assert progress_line({"eval_reward": 0.7}, step=0, max_steps=0) == "eval 0  reward 0.700"


def test_progress_line_names_the_evaluation_set():
    line = progress_line(
        {"eval_math_loss": 0.5, "eval_math_runtime": 3.0, "eval_reward": 1.0}, 3, 9
    )
    assert line == "eval_math 3/9  reward 1.000  loss 0.500  took 3.0 s"


@pytest.mark.parametrize(
    ("number", "text"),
    [(7.0, "7.00"), (999.4, "999"), (999.6, "1.00k"), (1234.0, "1.23k"), (2.5e6, "2.50M")],
)
def test_throughput_is_short(number, text):
    line = progress_line({"throughput/completion_tokens_per_s": number}, 1, 1)
    assert line == f"step 1/1  {text} tok/s"


class Doubler(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, labels=None):
        return {"loss": (self.weight * x).mean()}


def test_a_trainer_with_compact_progress_prints_one_line_per_log(tmp_path, capsys):
    arguments = TrainingArguments(
        tmp_path,
        max_steps=3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="no",
        dataloader_pin_memory=False,
        report_to=[],
    )
    data = [{"x": torch.tensor([1.0]), "labels": torch.tensor([1.0])}] * 8
    trainer = Trainer(Doubler(), arguments, train_dataset=data, eval_dataset=data)
    show_lines(trainer)
    trainer.train()
    printed = capsys.readouterr()
    lines = without_deepspeeds(printed.out).splitlines()
    starts = [line.split("  ")[0] for line in lines]
    assert "it/s" not in printed.err  # no bar off a terminal
    assert starts == ["step 1/3", "step 2/3", "step 3/3", "eval 3/3", "train 3/3"]


def begin(global_step=0, is_main=True):
    callback = CompactProgress()
    state = SimpleNamespace(
        max_steps=9,
        global_step=global_step,
        is_world_process_zero=is_main,
        is_local_process_zero=True,
    )
    callback.on_train_begin(None, state, None)
    return callback, state


def test_the_bar_of_a_resumed_run_starts_at_its_step(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(report, "tqdm", functools.partial(report.tqdm, file=terminal))
    callback, state = begin(global_step=6)
    state.global_step = 7
    callback.on_step_end(None, state, None)
    assert (callback.training_bar.initial, callback.training_bar.n) == (6, 7)
    assert "6/9" in terminal.getvalue()
    callback.on_train_end(None, state, None)


def test_a_long_rollout_has_a_bar_that_goes_when_it_ends(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(
        report, "tqdm", functools.partial(report.tqdm, file=terminal, mininterval=0, miniters=1)
    )
    monkeypatch.setattr(report, "BAR_DELAY_S", 0)
    with report.rollout_bar(4, is_shown=True) as finished:
        for tokens in (400, 700, 100):
            finished(tokens)
    assert "rollout 3/4 completions" in terminal.getvalue()
    assert "1.20k tokens" in terminal.getvalue()
    assert not terminal.getvalue().splitlines()[-1].strip()


@pytest.mark.parametrize(("is_shown", "delay_s"), [(False, 0), (True, 60)])
def test_a_short_rollout_has_none(monkeypatch, is_shown, delay_s):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(report, "tqdm", functools.partial(report.tqdm, file=terminal))
    monkeypatch.setattr(report, "BAR_DELAY_S", delay_s)
    with report.rollout_bar(4, is_shown=is_shown) as finished:
        finished(10)
    assert "rollout" not in terminal.getvalue()


def test_there_is_no_bar_off_a_terminal(capsys):
    callback, state = begin()
    state.global_step = 1
    callback.on_step_end(None, state, None)
    assert capsys.readouterr() == ("", "")


def test_a_log_of_the_users_own_is_a_line_too(capsys):
    callback, state = begin()
    callback.on_log(None, state, None, logs={"mine": 1.5, "epoch": 0.5})
    assert capsys.readouterr().out == "step 0/9  mine 1.50\n"


def test_a_log_of_many_others_stays_one_short_line():
    line = progress_line({f"m{i}": i for i in range(50)} | {"epoch": 1.0}, 3, 9)
    assert line.startswith("step 3/9  m0 0.00  m1 1.00  ")
    assert line.endswith("  m7 7.00  and 42 more")


@pytest.mark.parametrize("logs", [{}, {"epoch": 1.0}, {"note": "text"}])
def test_a_log_without_metrics_prints_nothing(capsys, logs):
    callback, state = begin()
    callback.on_log(None, state, None, logs=logs)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("loss", "shown"), [(-5.5e-9, "0"), (6e-7, "6.00e-07"), (0.25, "0.250")])
def test_a_loss_of_rounding_is_zero(loss, shown):
    assert progress_line({"loss": loss}, 3, 9) == f"step 3/9  loss {shown}"


def test_an_evaluation_under_a_second_took_some_time():
    assert progress_line({"eval_runtime": 0.42}, 3, 9) == "eval 3/9  took 0.4 s"


def test_a_line_is_in_a_piped_log_at_once(tmp_path, monkeypatch):
    callback, state = begin()
    with open(tmp_path / "log", "w") as log:
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", log)
            callback.on_log(None, state, None, logs={"reward": 1.0})
        assert (tmp_path / "log").read_text() == "step 0/9  reward 1.000\n"


class Mine(ProgressCallback):
    pass


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_lines_replace_what_transformers_shows_and_nothing_of_the_users(tmp_path, disable_tqdm):
    arguments = TrainingArguments(tmp_path, report_to=[], disable_tqdm=disable_tqdm)
    trainer = Trainer(Doubler(), arguments, callbacks=[Mine()])
    show_lines(trainer)
    shown = [c for c in trainer.callback_handler.callbacks
             if isinstance(c, ProgressCallback | PrinterCallback)]  # fmt: skip
    assert [type(c) for c in shown] == [Mine, CompactProgress]
    assert shown[1].bar != disable_tqdm


def test_only_the_main_process_prints(capsys):
    callback, state = begin(is_main=False)
    callback.on_log(None, state, None, logs=LOGS)
    assert capsys.readouterr().out == ""
