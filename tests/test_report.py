import functools
import io
import json
import logging
import math
import os
import random
import sys
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import without_deepspeeds
from matplotlib import rcParams
from matplotlib.figure import Figure
from PIL import Image
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from rloo_fast.reports import metrics_file
from rloo_fast.reports import progress as report
from rloo_fast.reports.completions import (
    MAX_CELL_CHARS,
    completions_dataframe,
    draw_rows,
    log_completions_table,
    message_text,
    print_table,
)
from rloo_fast.reports.curves import COLORS, plot_curves, running_mean
from rloo_fast.reports.metrics_file import MetricsWriter, read_metrics, write_atomically
from rloo_fast.reports.progress import CompactProgress, progress_line

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
REPLY = [{"role": "assistant", "content": "four"}]


def table(**changes):
    """Arguments of the completion tables: two prompts, two completions each."""
    arguments = {
        "prompts": ["sum?", "sum?", CHAT, CHAT],
        "completions": ["4", "5", REPLY, "none"],
        "rewards": {"accuracy": [1.0, 0.0, None, 0.25], "format": [0.5, math.nan, 0.0, -1.0]},
        "advantages": [0.75, -0.75, None, 0.0],
        "step": 7,
    }
    return arguments | changes


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    for name in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


# --- completions ----------------------------------------------------------------------------------


def test_messages_read_as_role_and_text():
    assert message_text(CHAT) == "system: Be brief.\nuser: 2 + 2?"


def test_message_with_image_reasoning_and_tool_call():
    image = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    reply = {"role": "assistant", "reasoning_content": "hm", "content": None, "tool_calls": [call]}
    assert message_text([image, reply]) == "user: [image]What?\nassistant: (hm)\nadd({'a': 1})"


def test_dataframe_has_one_column_per_reward_then_extra_then_advantage():
    frame = completions_dataframe(**table(extra={"source": ["a", "b", None, "d"]}))
    columns = ["step", "prompt", "completion", "accuracy", "format", "source", "advantage"]
    assert list(frame.columns) == columns
    assert frame["step"].tolist() == [7] * 4
    assert frame["completion"].tolist() == ["4", "5", "assistant: four", "none"]
    np.testing.assert_array_equal(frame["accuracy"], [1.0, 0.0, math.nan, 0.25])
    np.testing.assert_array_equal(frame["advantage"], [0.75, -0.75, math.nan, 0.0])


def test_reward_column_of_none_is_a_number_column():
    frame = completions_dataframe(**table(rewards={"judge": [None] * 4}))
    assert frame["judge"].dtype == "float64"
    assert frame["judge"].isna().all()


def test_tensors_and_numpy_scalars_are_numbers():
    rewards = {"a": torch.tensor([1.0, 0.5, 0.0, 2.0]), "b": list(np.float32([1, 2, 3, 4]))}
    frame = completions_dataframe(**table(rewards=rewards))
    assert (frame["a"].tolist(), frame["b"].tolist()) == ([1.0, 0.5, 0.0, 2.0], [1, 2, 3, 4])


def test_unique_prompts_keeps_the_first_completion_of_each():
    frame = completions_dataframe(**table(unique_prompts=True))
    assert frame["completion"].tolist() == ["4", "assistant: four"]


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"one value per completion.*'accuracy': 3"):
        completions_dataframe(**table(rewards={"accuracy": [1.0, 2.0, 3.0]}))


@pytest.mark.parametrize("name", ["prompt", "accuracy"])
def test_extra_column_with_a_taken_name_is_refused(name):
    with pytest.raises(ValueError, match=f"distinct column names, .*{name}"):
        completions_dataframe(**table(extra={name: ["x"] * 4}))


def print_completions(*columns, num_samples=None, seed=0, **named):
    frame = completions_dataframe(*columns, **named)
    print_table(draw_rows(frame, num_samples, seed), total=len(frame))


def cells(text):
    """The table's rows as lists of cells, a folded cell joined."""
    rows, row = [], []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split("│")[2:-2]]
        if line.startswith("│ │"):
            row = [a + b for a, b in zip(row, parts, strict=True)] if row else parts
        elif row:
            rows, row = [*rows, row], []
    return rows


def test_printed_rows_hold_texts_rewards_and_advantages(capsys):
    print_completions(**table(extra={"source": ["a", "b", None, "d"]}))
    out = capsys.readouterr().out
    assert "Step 7" in out
    assert "4 of 4 completions" in out
    rows = cells(out)
    assert rows[0] == ["sum?", "4", "1.000", "0.500", "a", "0.750"]
    assert rows[1] == ["sum?", "5", "0.000", "–", "b", "-0.750"]
    assert rows[2] == ["system: Be brief.user: 2 + 2?", "assistant: four", "–", "0.000", "–", "–"]


def test_markup_and_escape_sequences_of_a_completion_are_shown_not_obeyed(capsys):
    print_completions(["p"], ["[bold]x[/bold] \x1b[2J"], {"r": [0.0]}, [0.0], 1)
    out = capsys.readouterr().out
    assert "[bold]x[/bold] ␛[2J" in out
    assert "\x1b" not in out


def test_a_text_below_the_bound_is_printed_whole(capsys):
    text = "".join(random.Random(0).choices("abcdefgh", k=MAX_CELL_CHARS))
    print_completions(["p"], [text], {"r": [0.0]}, [0.0], 1)
    assert cells(capsys.readouterr().out)[0][1] == text


def test_a_longer_text_says_how_much_is_left_out(capsys):
    print_completions(["p"], ["a" * MAX_CELL_CHARS + "b" * 300], {"r": [0.0]}, [0.0], 1)
    shown = cells(capsys.readouterr().out)[0][1]
    assert "300characters" in shown.replace(" ", "")
    assert (shown.startswith("aaa"), shown.endswith("bbb")) == (True, True)


def test_num_samples_draws_by_seed_and_step(capsys):
    def drawn(seed, step):
        many = [str(i) for i in range(50)]
        columns = [["p"] * 50, many, {"r": [0.0] * 50}, [0.0] * 50, step]
        print_completions(*columns, num_samples=5, seed=seed)
        out = capsys.readouterr().out
        assert "5 of 50 completions" in out
        return [int(row[1]) for row in cells(out)]

    assert drawn(0, 1) == drawn(0, 1) == sorted(drawn(0, 1))
    assert len({tuple(drawn(seed, step)) for seed in (0, 1) for step in (1, 2)}) == 4


def test_drawing_samples_leaves_the_global_random_states_alone(capsys):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    print_completions(**table(num_samples=2))
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_num_samples_below_one_is_refused():
    with pytest.raises(ValueError, match="num_samples must be >= 1"):
        print_completions(**table(num_samples=0))


def test_no_column_is_lost_on_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    rewards = {f"reward_function_{i}": [-10.0 - i] for i in range(8)}
    print_completions(["p" * 30], ["c"], rewards, [0.5], 1)
    expected = [f"{-10.0 - i:.3f}" for i in range(8)]
    assert cells(capsys.readouterr().out)[0] == ["p" * 30, "c", *expected, "0.500"]


def test_a_stdout_that_is_not_unicode_gets_escapes_not_an_error(monkeypatch):
    written = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
        print_completions(["é"], ["猫"], {"r": [None]}, [0.0], 1)
        sys.stdout.flush()
        assert b"\\xe9" in written.getvalue()
        assert b"\\u732b" in written.getvalue()


class FakeTracker(ModuleType):
    """Stands for wandb and trackio: both offer Table(dataframe=) and log(dict)."""

    def __init__(self, name, run):
        super().__init__(name)
        self.run = run
        self.context_vars = SimpleNamespace(current_run=ContextVar(name, default=run))
        self.logged = []
        self.log = self.logged.append
        self.Table = lambda dataframe: dataframe


@pytest.fixture
def trackers(monkeypatch):
    def install(run):
        fakes = {name: FakeTracker(name, run) for name in ("wandb", "trackio")}
        for name, fake in fakes.items():
            monkeypatch.setitem(sys.modules, name, fake)
        return fakes

    return install


@pytest.mark.parametrize("chosen", ["wandb", "trackio"])
def test_the_table_goes_to_the_chosen_tracker_only(trackers, chosen):
    fakes = trackers(run=object())
    frame = completions_dataframe(**table())
    log_completions_table(["tensorboard", chosen], frame)
    (logged,) = fakes.pop(chosen).logged
    pd.testing.assert_frame_equal(logged["completions"], frame)
    assert logged["train/global_step"] == 7
    assert next(iter(fakes.values())).logged == []


def test_nothing_is_sent_without_an_active_run(trackers):
    fakes = trackers(run=None)
    log_completions_table(["wandb", "trackio"], completions_dataframe(**table()))
    assert [fake.logged for fake in fakes.values()] == [[], []]


@pytest.mark.parametrize("module", [None, ModuleType("wandb")], ids=["absent", "a run directory"])
def test_nothing_is_sent_to_a_tracker_that_is_not_installed(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "wandb", module)  # None makes the import fail
    log_completions_table(["wandb"], completions_dataframe(**table()))


# --- metrics.jsonl --------------------------------------------------------------------------------


def write_steps(writer, steps):
    for step in steps:
        writer.write(step, {"reward": step / 3, "learning_rate": 1e-6})
        if step % 4 == 0:
            writer.write(step, {"eval_reward": step / 7})


@pytest.mark.parametrize("killed_at", [4, 5, 7])
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path, killed_at):
    write_steps(MetricsWriter(tmp_path / "whole"), range(1, 10))
    write_steps(MetricsWriter(tmp_path / "resumed"), range(1, killed_at + 1))
    with open(tmp_path / "resumed/metrics.jsonl", "ab") as file:
        file.write(b'{"step": 8, "rew')
    write_steps(MetricsWriter(tmp_path / "resumed", resume_step=4), range(5, 10))
    files = [(tmp_path / run / "metrics.jsonl").read_bytes() for run in ("whole", "resumed")]
    assert files[0] == files[1]
    assert len(files[0].splitlines()) == 11


def test_a_resume_that_cannot_rewrite_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    write_steps(MetricsWriter(tmp_path), range(1, 10))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        MetricsWriter(tmp_path, resume_step=4)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "metrics.jsonl": before
    }


def test_a_new_run_keeps_the_former_file_beside_its_own(tmp_path):
    for value in (1.0, 2.0, 3.0):
        MetricsWriter(tmp_path).write(1, {"reward": value})
    names = ("metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl")
    assert [json.loads((tmp_path / name).read_text())["reward"] for name in names] == [1, 2, 3]


def test_lines_are_strict_json(tmp_path):
    metrics = {"loss": math.nan, "grad_norm": math.inf, "kl": np.float32(0.5), "n": torch.tensor(3)}
    MetricsWriter(tmp_path).write(2, metrics | {"step": 99})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 2, "loss": null, "grad_norm": null, "kl": 0.5, "n": 3}\n'


class FullDisk:
    """A file that takes `room` bytes of each write, then is full; counts its writes."""

    room, writes = 0, 0

    def __init__(self, path, mode, buffering):
        self.file = open(path, mode, buffering=buffering)  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        FullDisk.writes += 1
        if not self.room:
            raise OSError(28, "No space left on device")
        return self.file.write(data[: self.room])

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 9], ids=["raises", "writes a part"])
def test_a_full_disk_is_reported_once_and_stops_nothing(tmp_path, monkeypatch, caplog, room):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"reward": 0.1})
    monkeypatch.setattr(FullDisk, "room", room)
    monkeypatch.setattr(FullDisk, "writes", 0)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(metrics_file, "open", FullDisk, raising=False)
        writer.write(2, {"reward": 0.2})
        writer.write(3, {"reward": 0.3})
    assert FullDisk.writes == 2
    (warning,) = caplog.messages
    assert "No space left on device" in warning
    writer.write(4, {"reward": 0.4})  # there is room again
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 4]


def test_read_metrics_leaves_out_a_cut_last_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "kl": null}\n{"step": 2, "k')
    assert read_metrics(tmp_path) == [{"step": 1, "kl": None}]


def test_read_metrics_names_a_damaged_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: expected a JSON object"):
        read_metrics(tmp_path)


def test_write_atomically_replaces_the_whole_file_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"a longer old text")
    with open(path, "rb") as reader:
        write_atomically(path, b"new")
        assert reader.read() == b"a longer old text"  # who was reading the old file still does
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


# --- curves ---------------------------------------------------------------------------------------


def make_run(run_dir, steps=60, slope=1.0, with_eval=True, **constant):
    writer = MetricsWriter(run_dir)
    for step in range(1, steps + 1):
        noise = (-1) ** step * 0.1
        row = {"reward": slope * step + noise, "entropy": 1.0, "completions/mean_length": 50.0}
        writer.write(step, row | constant)
        if with_eval and step % 20 == 0:
            writer.write(step, {"eval_accuracy": step / steps})
    return Path(run_dir)


@pytest.fixture
def figures(monkeypatch):
    """The figures that plot_curves saves, still as objects."""
    saved, savefig = [], Figure.savefig

    def spy(figure, *args, **kwargs):
        saved.append(figure)
        return savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return saved


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_curves_are_a_png_of_readme_size(tmp_path):
    plot_curves([make_run(tmp_path / "run", kl=0.1)], tmp_path / "plots/curves.png")
    with Image.open(tmp_path / "plots/curves.png") as image:
        assert (image.format, image.size) == ("PNG", (1000, 600))


def test_every_logged_metric_has_a_panel_with_its_unit(tmp_path, figures):
    run = make_run(tmp_path / "run", kl=0.1)
    plot_curves([run], tmp_path / "curves.png")
    units = {title: axes.get_ylabel() for title, axes in panels(figures[0]).items()}
    assert units == {
        "Reward": "mean per completion",
        "KL to the reference": "nats per token",
        "Entropy": "nats per token",
        "Completion length": "tokens",
        "Accuracy, held-out prompts": "share correct",
    }


def test_a_metric_that_was_not_logged_has_no_panel(tmp_path, figures):
    plot_curves([make_run(tmp_path / "run", with_eval=False, kl=None)], tmp_path / "curves.png")
    assert list(panels(figures[0])) == ["Reward", "Entropy", "Completion length"]


def test_the_light_line_is_the_log_and_the_bold_one_its_mean(tmp_path, figures):
    plot_curves([make_run(tmp_path / "run")], tmp_path / "curves.png")
    light, bold = panels(figures[0])["Reward"].lines
    steps = np.arange(1, 61)
    logged = steps + (-1.0) ** steps * 0.1
    np.testing.assert_allclose(light.get_ydata(), logged)
    # a fifteenth of 60 logs: the mean of five
    np.testing.assert_allclose(bold.get_ydata()[2:-2], np.convolve(logged, np.ones(5) / 5, "valid"))


def test_running_mean_takes_what_there_is_at_the_ends():
    np.testing.assert_allclose(
        running_mean(np.array([0.0, 3.0, 6.0, 0.0]), 3), [1.5, 3.0, 3.0, 3.0]
    )


def test_missing_values_are_gaps_not_zeros(tmp_path, figures):
    writer = MetricsWriter(tmp_path)
    for step, reward in [(1, 0.5), (2, math.nan), (3, 0.7)]:
        writer.write(step, {"reward": reward})
    plot_curves([tmp_path], tmp_path / "curves.png")
    line = panels(figures[0])["Reward"].lines[0]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 3], [0.5, 0.7])


def test_reward_functions_are_drawn_beside_their_sum(tmp_path, figures):
    parts = {"rewards/accuracy/mean": 0.2, "rewards/format/mean": 0.3}
    plot_curves([make_run(tmp_path / "run", **parts)], tmp_path / "curves.png")
    legend = panels(figures[0])["Reward"].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [
        "weighted sum",
        "accuracy",
        "format",
    ]


def test_several_runs_share_panels_and_have_a_legend(tmp_path, figures):
    runs = [make_run(tmp_path / "slow"), make_run(tmp_path / "fast", slope=2.0, steps=40)]
    plot_curves(runs, tmp_path / "curves.png")
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["slow", "fast"]
    assert len({axes.get_xlim() for axes in figures[0].axes}) == 1
    pixels = {
        tuple(c) for c in np.asarray(Image.open(tmp_path / "curves.png"))[..., :3].reshape(-1, 3)
    }
    for color in COLORS[:2]:
        assert tuple(bytes.fromhex(color[1:])) in pixels


def test_runs_of_the_same_name_are_told_apart_by_their_parents(tmp_path, figures):
    runs = [make_run(tmp_path / "a/out"), make_run(tmp_path / "b/out")]
    plot_curves(runs, tmp_path / "curves.png")
    names = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert names == [os.path.join("a", "out"), os.path.join("b", "out")]


def test_keys_choose_the_panels_and_their_order(tmp_path, figures):
    run = make_run(tmp_path / "run", grad_norm=2.0)
    plot_curves([run], tmp_path / "curves.png", keys=["grad_norm", "entropy"])
    assert list(panels(figures[0])) == ["grad_norm", "Entropy"]


def test_an_unknown_key_is_refused_with_those_that_are_there(tmp_path):
    with pytest.raises(ValueError, match=r"\['rewrad'\].*'entropy', 'eval_accuracy', 'reward'"):
        plot_curves([make_run(tmp_path / "run")], tmp_path / "x.png", keys=["reward", "rewrad"])


@pytest.mark.parametrize("content", [None, b"", b'{"step": 1, "re'], ids=["none", "empty", "cut"])
def test_a_directory_without_metrics_is_refused(tmp_path, content):
    (tmp_path / "empty").mkdir()
    if content is not None:
        (tmp_path / "empty/metrics.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"No metrics in .*empty"):
        plot_curves([make_run(tmp_path / "run"), tmp_path / "empty"], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_a_run_of_nothing_but_nan_is_refused(tmp_path):
    MetricsWriter(tmp_path / "nan").write(1, {"reward": math.nan, "epoch": 0.5})
    with pytest.raises(ValueError, match=r"nan has nothing to draw: all its metrics are NaN"):
        plot_curves([make_run(tmp_path / "run"), tmp_path / "nan"], tmp_path / "curves.png")


def test_a_metric_that_is_only_nan_is_told_from_one_that_is_not_logged(tmp_path):
    MetricsWriter(tmp_path / "run").write(1, {"reward": math.nan, "step_time": 0.5})
    with pytest.raises(ValueError, match=r"logged are \['step_time'\]. Only NaN .*: \['reward'\]"):
        plot_curves([tmp_path / "run"], tmp_path / "curves.png")


def test_a_run_given_twice_is_refused(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"given more than once: .*run, .*run; give each once"):
        plot_curves([run, tmp_path / "x/../run"], tmp_path / "curves.png")


def test_drawing_changes_no_global_matplotlib_state(tmp_path):
    before = dict(rcParams)
    had_pyplot = "matplotlib.pyplot" in sys.modules
    plot_curves([make_run(tmp_path / "run")], tmp_path / "curves.png")
    assert dict(rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def make_seed(run_dir, values, **columns):
    """A run of few logs, at steps 2, 4, ...; its lines are drawn as logged."""
    writer = MetricsWriter(run_dir)
    for number, value in enumerate(values, start=1):
        more = {name: column[number - 1] for name, column in columns.items()}
        writer.write(2 * number, {"reward": value} | more)
    return Path(run_dir)


def test_runs_of_equal_label_are_their_mean_in_a_band(tmp_path, figures):
    values = {"a": [0.0, 0.2, 0.4], "b": [0.2, 0.6, 0.5], "c": [0.1, 0.1, 0.9], "d": [1, 1, 1]}
    runs = [make_seed(tmp_path / name, column) for name, column in values.items()]
    plot_curves(runs, tmp_path / "curves.png", labels=["rloo", "rloo", "rloo", "grpo"])
    axes = panels(figures[0])["Reward"]
    mean = axes.lines[0]
    np.testing.assert_allclose(mean.get_xdata(), [2, 4, 6])
    np.testing.assert_allclose(mean.get_ydata(), [0.1, 0.3, 0.6])
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    edges = {x: corners[corners[:, 0] == x][:, 1] for x in (2, 4, 6)}
    assert [edges[x].min() for x in (2, 4, 6)] == [0.0, 0.1, 0.4]
    assert [edges[x].max() for x in (2, 4, 6)] == [0.2, 0.6, 0.9]
    names = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert names == ["rloo (mean of 3 runs)", "grpo", "band: least to largest"]


def test_a_mean_goes_as_far_as_all_its_runs_and_over_the_steps_of_each(tmp_path, figures):
    long = make_seed(tmp_path / "long", [0.0, 0.2, 0.4, 0.6])
    short = MetricsWriter(tmp_path / "short")
    for step, reward in [(1, 1.0), (3, 0.8), (5, 0.6)]:
        short.write(step, {"reward": reward})
    plot_curves([long, tmp_path / "short"], tmp_path / "x.png", labels=["m", "m"])
    (mean,) = panels(figures[0])["Reward"].lines
    np.testing.assert_allclose(mean.get_xdata(), [2, 3, 4, 5])
    np.testing.assert_allclose(mean.get_ydata(), [0.45, 0.45, 0.45, 0.45])


def test_labels_are_one_for_each_directory(tmp_path):
    run = make_seed(tmp_path / "run", [1.0])
    with pytest.raises(ValueError, match=r"2 labels for 1 directories: expected one for each"):
        plot_curves([run], tmp_path / "curves.png", labels=["a", "b"])


@pytest.mark.parametrize(
    ("x", "places", "name"),
    [
        ("step", [2, 4, 6], "optimizer step"),
        ("num_tokens", [100, 250, 300], "tokens of prompts and completions"),
        ("time", [2, 3, 13], "time in steps, evaluations left out (minutes)"),
    ],
)
def test_the_x_axis_is_what_was_asked_for(tmp_path, figures, x, places, name):
    columns = {"num_tokens": [100, 250, 300], "step_time": [60.0, 30.0, 300.0]}
    run = make_seed(tmp_path / "run", [0.1, 0.2, 0.3], **columns)
    plot_curves([run], tmp_path / "curves.png", x=x)
    axes = panels(figures[0])["Reward"]
    assert list(axes.lines[0].get_xdata()) == places
    assert axes.get_xlabel() == name


@pytest.mark.parametrize("x", ["num_tokens", "time"])
def test_an_evaluation_stands_where_the_step_before_it_does(tmp_path, figures, x):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, {"reward": 0.1, "num_tokens": 10 * step, "step_time": 10.0})
    writer.write(3, {"eval_accuracy": 0.5, "eval_num_tokens": 30})
    plot_curves([tmp_path], tmp_path / "curves.png", x=x)
    assert list(panels(figures[0])["Accuracy, held-out prompts"].lines[0].get_xdata()) == [30]


# --- the progress line ----------------------------------------------------------------------------

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
        "  12.3k tok/s  2.31 s/step  lr 1e-06  loss -0.0123  grad 0.512"
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
    assert line == "eval_math 3/9  reward 1.000  loss 0.5  took 0:00:03"


@pytest.mark.parametrize(
    ("number", "text"),
    [(7.0, "7"), (999.4, "999"), (999.6, "1k"), (1234.0, "1.23k"), (2.5e6, "2.5M")],
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
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(CompactProgress())
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


def test_there_is_no_bar_off_a_terminal(capsys):
    callback, state = begin()
    state.global_step = 1
    callback.on_step_end(None, state, None)
    assert capsys.readouterr() == ("", "")


def test_a_log_without_known_metrics_is_printed_as_transformers_does(capsys):
    callback, state = begin()
    callback.on_log(None, state, None, logs={"mine": 1.5})
    assert capsys.readouterr().out == "{'mine': '1.5'}\n"


def test_only_the_main_process_prints(capsys):
    callback, state = begin(is_main=False)
    callback.on_log(None, state, None, logs=LOGS)
    assert capsys.readouterr().out == ""
