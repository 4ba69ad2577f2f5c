"""Training processes that are stopped from outside: kill -9, SIGTERM, no room for a file."""

from __future__ import annotations

import logging
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from rloo_fast.checkpoint.files import checkpoints
from tests.support import kill_resume
from tests.support.kill_resume import is_exact, make_trainer, metrics_of, start
from tests.support.launch import forks

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {
    "num_iterations": 2,
    "logging_steps": 2,
    "save_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "warmup_steps": 3,
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run in a process that is left alone."""
    output_dir = tmp_path_factory.mktemp("reference")
    process = start(output_dir, SETTINGS)
    process.join()
    assert process.exitcode == 0
    return output_dir


def finish(output_dir: Path) -> None:
    process = start(output_dir, SETTINGS)
    process.join()
    assert process.exitcode == 0


def names(output_dir: Path) -> list[str]:
    return [path.name for path in checkpoints(output_dir)]


class Begun(TrainerCallback):
    """Step 5 says that it runs, and waits to be killed, or told to go on."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            (Path(args.output_dir) / "begun").touch()
            while not (Path(args.output_dir) / "go_on").exists():
                time.sleep(0.01)


def make_observed(output_dir: Path, **settings: Any) -> Any:
    trainer = make_trainer(output_dir, **settings)
    trainer.add_callback(Begun())
    return trainer


def wait_until_step_5_runs(process: Any, output_dir: Path) -> None:
    while process.is_alive() and not (output_dir / "begun").exists():
        time.sleep(0.01)


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path, reference):
    process = start(tmp_path, SETTINGS, make_observed)
    wait_until_step_5_runs(process, tmp_path)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert names(tmp_path) == ["checkpoint-3"]

    finish(tmp_path)

    assert is_exact(tmp_path, reference)


def test_sigterm_saves_the_step_that_runs_and_exits_with_0(tmp_path, reference):
    process = start(tmp_path, SETTINGS, make_observed)
    wait_until_step_5_runs(process, tmp_path)
    process.terminate()
    (tmp_path / "go_on").touch()
    process.join()
    assert process.exitcode == 0
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-5"]
    assert not (tmp_path / "final").exists()  # train() did not return to the script
    assert [row["step"] for row in metrics_of(tmp_path)] == [2, 4, 4]

    finish(tmp_path)

    assert is_exact(tmp_path, reference)


class LimitFileSize(TrainerCallback):
    """No file can grow beyond 20 kB, as if the disk were full, from step 2 to step 4."""

    def on_step_begin(self, args, state, control, **kwargs):
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        full = 2 <= state.global_step + 1 <= 4
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if full else most, most))


def train_without_room(output_dir: Path, log: Path) -> None:
    logging.basicConfig(filename=log)
    trainer = make_trainer(output_dir, save_steps=1)
    trainer.add_callback(LimitFileSize())
    trainer.train()
    (output_dir / "failed").write_text(str(trainer.checkpoints.num_failed))


def test_without_room_for_a_checkpoint_training_goes_on(tmp_path):
    output_dir, log = tmp_path / "run", tmp_path / "log"
    process = forks().Process(target=train_without_room, args=(output_dir, log))
    process.start()
    process.join()

    assert process.exitcode == 0
    assert names(output_dir) == ["checkpoint-1", "checkpoint-5", "checkpoint-6"]
    assert (output_dir / "failed").read_text() == "3"
    assert log.read_text().count("Training goes on; the newest checkpoint is checkpoint-1.") == 3


@pytest.mark.parametrize("case", ["plain", "dynamic"])
def test_runs_killed_at_random_moments_end_as_if_left_alone(case, capsys):
    assert kill_resume.main(["--runs", "2", "--seed", "1", "--case", case]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 exact resumes of 2"
