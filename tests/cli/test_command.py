"""The command itself: help, version, exit status, and what it does not import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rloo_fast import cli
from rloo_fast.cli.options import UsageError
from rloo_fast.rewards import load_reward_functions
from tests.support.commands import THREE, FakeTrainer
from tests.support.paths import python_path

PLAN = ["--model", "7b", "--gpus", "8"]


MISTAKES = ("typo in train", "typo in eval", "too little for eval", "4 bits without adapters")


@pytest.mark.parametrize(
    "code",
    [
        "import rloo_fast",
        "import rloo_fast.cli as c; c.main([]); c.main(['--version'])",
        "import rloo_fast.cli as c; c.main(['--help'])",
        "import rloo_fast.cli as c; assert c.main(['train', '--lr', '1']) == 2",
        "import rloo_fast.cli as c; assert c.main(['eval', 'reward', '--lr', '1']) == 2",
        "import rloo_fast.cli as c; assert c.main(['eval', 'reward']) == 2",
        f"import rloo_fast.cli as c; assert c.main(['train', *{THREE}, '--load_in_4bit']) == 2",
        "import rloo_fast.config.names_2024",
        "from rloo_fast.objective.losses import ADVANTAGES, LOSSES; assert ADVANTAGES and LOSSES",
        "from rloo_fast.batching.layouts import LAYOUTS; assert LAYOUTS",
        "from rloo_fast.config.rollout_engine import SAME_AS; assert SAME_AS",
    ],
    ids=["package", "command", "help", *MISTAKES, "names of 2024", "losses", "layouts", "engines"],
)
def test_what_imports_no_torch(code):
    code += "; import sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_it_runs_as_a_module():
    run = [sys.executable, "-m", "rloo_fast", "--version"]
    assert subprocess.check_output(run, text=True).startswith("rloo-fast 0.")


ABORTS_IN_A_DESTRUCTOR = """
import atexit, os, sys
import rloo_fast.cli as cli
class Torch:
    def __del__(self): os.abort()
sys.modules["torch"] = Torch()
atexit.register(print, "trackers are done")
sys.argv = ["rloo-fast", *sys.argv[1:]]
cli.run_and_exit()
"""


@pytest.mark.parametrize(
    ("processes", "word", "status"), [("2", "--version", 0), ("2", "trian", 2), ("1", "trian", -6)]
)
def test_a_process_of_several_ends_without_destructors(processes, word, status):
    # gloo's abort sometimes, and the launcher then stops the rank that still writes the model
    done = subprocess.run(
        [sys.executable, "-c", ABORTS_IN_A_DESTRUCTOR, word],
        env={**os.environ, "WORLD_SIZE": processes, "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status
    assert "trackers are done" in done.stdout


def test_no_arguments_print_the_commands(capsys):
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in cli.COMMANDS)


def test_an_unknown_command_names_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    assert "Did you mean train?" in capsys.readouterr().err


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("RLOO_FAST_DEBUG", "1")
    with pytest.raises(UsageError, match="num_generations") as caught:
        cli.main(["train", *THREE, "--num_generations", "1"])
    assert isinstance(caught.value.__cause__, ValueError)


def test_trackers_see_no_secret_in_the_command_line(monkeypatch, capsys):
    words = ["--hub_token", "pL4nt-0a1b2c3d4e5f", "--beta", "0.1", "--zzz"]
    monkeypatch.setattr("sys.argv", ["rloo-fast", "train", *words])
    monkeypatch.setattr("sys.excepthook", sys.excepthook)
    assert cli.main() == 2
    assert sys.argv[1:] == ["train", "--hub_token", "<masked>", "--beta", "0.1", "--zzz"]
    assert "unknown option --zzz" in capsys.readouterr().err


def test_errors_of_other_processes_say_which(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    cli.main(["train"])
    assert "error (process 3): missing" in capsys.readouterr().err


def test_the_reader_of_the_output_may_go_away():
    """As in `rloo-fast plan ... | head -1`: no traceback, and the command's own exit status."""
    for words in (["--help"], ["train", "--help", "all"], ["recipe"], ["plan", *PLAN]):
        run = subprocess.Popen(
            [sys.executable, "-m", "rloo_fast", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert run.stdout is not None
        run.stdout.close()  # before the first line
        _, err = run.communicate(timeout=600)
        assert (run.returncode, err) == (0, b""), words


@pytest.mark.parametrize(
    "words",
    [
        ["doctor", "--json"],
        ["plan", "--model=7b", "--gpus", "8", "--gpus-per-node", "8", "--micro_batches", "2"],
        ["plan", *PLAN, "--no-checkpointing"],
        ["plan", *PLAN, "--no_checkpointing", "--vllm_share=0.3"],
    ],
)
def test_options_are_written_with_a_line_above_or_below(words, capsys):
    assert cli.main(words) == 0


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [("--help", 0, "usage: rloo-fast"), ("train --max_steps 1", 2, "has been deleted: change to")],
)
def test_a_directory_that_was_deleted_is_said_to_be(tmp_path, words, status, sentence):
    command = (
        f'mkdir gone && cd gone && rmdir ../gone && exec "{sys.executable}" -m rloo_fast {words}'
    )
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    assert sentence in done.stdout + done.stderr


def test_quickstart_takes_hyphens(capsys):
    assert cli.main(["quickstart", "--max-steps", "1"]) == 2
    assert "must be >= 2" in capsys.readouterr().err


def test_a_typo_names_the_nearest_option(capsys):
    assert cli.main(["plan", *PLAN, "--vllm-shar", "0.3"]) == 2
    assert capsys.readouterr().err == (
        "rloo-fast: error: unknown option --vllm-shar: did you mean --vllm_share?\n"
    )


def test_recipe_has_a_help(capsys):
    assert cli.main(["recipe", "--help"]) == 0
    assert "usage: rloo-fast recipe" in capsys.readouterr().out


def test_a_failure_is_a_sentence_with_the_users_own_lines(folder, trainers, capsys, monkeypatch):
    """The traceback of a reward is mostly ours: its file and line are what the user needs."""
    (folder / "bad.py").write_text(
        "def helper(text):\n    return text[99]\n\n"
        "def f(completions, **kwargs):\n    return [helper(c) for c in completions]\n"
    )

    def train(self, **kwargs):
        rewards = load_reward_functions("bad.py:f")
        rewards(["p"], ["short"], [[1]], {})

    monkeypatch.setattr(FakeTrainer, "train", train, raising=False)
    assert cli.main(["train", *THREE, "--output_dir", "out"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[0].startswith("rloo-fast: error: Reward function 'f' raised IndexError")
    assert [line for line in lines if "bad.py:2, in helper: return text[99]" in line]
    assert len(lines) <= 6
    kept = lines[-1].split("traceback is in ")[1].split(".txt")[0] + ".txt"
    assert "Traceback (most recent call last)" in Path(kept).read_text()
    Path(kept).unlink()


def test_an_error_of_our_own_kind_of_mistake_keeps_its_traceback(trainers, monkeypatch):
    def train(self, **kwargs):
        raise KeyError("ours")

    monkeypatch.setattr(FakeTrainer, "train", train, raising=False)
    with pytest.raises(KeyError):
        cli.main(["train", *THREE])


def test_a_run_without_any_reward_says_so_and_is_no_success(trainers, capsys, monkeypatch):
    monkeypatch.setattr(
        FakeTrainer,
        "train",
        lambda self, **kwargs: self.state.log_history.__setitem__(
            slice(None), [{"loss": 0.0, "kl": 0.0, "step": 1}, {"train_loss": 0.0}]
        ),
        raising=False,
    )
    assert cli.main(["train", *THREE, "--output_dir", "out"]) == 1
    assert "returned None for every completion" in capsys.readouterr().err


STRAY = "import os, sys; sys.stderr.write('stray ' + __name__); os._exit(9)\n"
# what Python itself imports for `python -m`, before any code of ours
FOR_RUNPY = {
    "collections", "contextlib", "functools", "importlib", "keyword", "operator", "pkgutil",
    "reprlib", "runpy", "types", "warnings",
}  # fmt: skip
NEEDED = ("yaml", "torch", "numpy", "transformers", "psutil", "accelerate", "packaging", "datasets")
# as the installed script, whose own folder stands first
SCRIPT = ["-P", "-c", "import sys; from rloo_fast.cli import main; sys.exit(main())"]


@pytest.mark.run
@pytest.mark.parametrize("how", [SCRIPT, ["-m", "rloo_fast"]], ids=["command", "module"])
@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["doctor", "--json"]])
def test_files_beside_it_stand_for_no_module(tmp_path, how, argv):
    names = {*NEEDED, *sys.stdlib_module_names} - (FOR_RUNPY if "-m" in how else set())
    for name in names:
        (tmp_path / f"{name}.py").write_text(STRAY)
    if "-m" not in how:
        (tmp_path / "rloo_fast").mkdir()
        (tmp_path / "rloo_fast" / "__init__.py").write_text(STRAY)
    done = subprocess.run(
        [sys.executable, *how, *argv], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, "stray" in done.stderr) == (0, False), done.stderr


def test_the_directory_of_the_command_comes_last(folder, trainers):
    (folder / "yaml.py").write_text(STRAY)
    (folder / "beside.py").write_text("def f(completions, **kwargs):\n    return [0.0]\n")
    assert cli.main(["train", *THREE, "--reward_funcs", "beside:f"]) == 0
    assert sys.path[-1] == str(folder)
