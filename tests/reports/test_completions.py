"""Samples as a table: on the terminal and for trackers."""

import io
import math
import random
import sys
from contextvars import ContextVar
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tqdm.auto import tqdm

from rloo_fast.reports.completions import (
    MAX_CELL_CHARS,
    completions_dataframe,
    draw_rows,
    log_completions_table,
    message_text,
    print_table,
)

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


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"one value per completion.*'accuracy': 3"):
        completions_dataframe(**table(rewards={"accuracy": [1.0, 2.0, 3.0]}))


@pytest.mark.parametrize("name", ["prompt", "accuracy", "mode"])
def test_an_extra_column_with_a_taken_name_gets_another(name):
    frame = completions_dataframe(**table(extra={name: ["x"] * 4}))
    assert frame[f"extra/{name}"].tolist() == ["x"] * 4
    assert frame["prompt"].tolist()[0] == "sum?"
    assert frame["accuracy"].tolist()[0] == 1.0


def test_a_reward_function_with_a_taken_name_gets_another():
    frame = completions_dataframe(**table(rewards={"completion": [1.0, 2.0, 3.0, 4.0]}))
    assert frame["reward/completion"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert frame["completion"].tolist()[0] == "4"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def on_terminal(monkeypatch):
    """One terminal for stdout and stderr."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def test_a_table_and_a_progress_bar_do_not_share_a_line(monkeypatch):
    """What tears a table: the bar's text before its frame, on the line that the bar stands on."""
    terminal = on_terminal(monkeypatch)
    with tqdm(total=10, file=terminal, mininterval=0, ncols=60) as bar:
        bar.update(3)
        print_completions(**table())
        bar.update(1)
    lines = terminal.getvalue().split("\n")
    framed = [line for line in lines if set(line) & set("╭│╰")]
    assert len(framed) > 8
    for line in framed:  # a carriage return goes back to the start: what counts is after the last
        *overwritten, left = line.split("\r")
        assert left.lstrip("\x1b[0m").startswith(("╭", "│", "╰"))
        assert not overwritten or overwritten[-1].strip() == ""  # the bar was wiped out before
    assert "4/10" in terminal.getvalue().rsplit("╯", 1)[1]  # and stands below the table again


def test_a_table_is_there_at_once_in_a_piped_log(tmp_path, monkeypatch):
    with open(tmp_path / "log", "w") as log:  # buffered, as a pipe is
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", log)
            print_completions(**table())
        assert "4 of 4 completions" in (tmp_path / "log").read_text()


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


def test_no_text_turns_the_letters_around_it_or_begins_a_sequence_in_one_character(capsys):
    print_completions(["p"], ["a\x9b31mb\u202ec\u2066d\x7f"], {"r": [0.0]}, [0.0], 1)
    out = capsys.readouterr().out
    assert not {*out} & {"\x9b", "\u202e", "\u2066", "\x7f"}
    assert "31mb" in out


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
