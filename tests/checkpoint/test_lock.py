"""Two runs cannot have one output_dir."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rloo_fast.checkpoint.files import find_checkpoint
from rloo_fast.checkpoint.lock import LOCK, locked
from tests.support.interrupted import names
from tests.support.kill_resume import make_trainer

ALONE: Any = SimpleNamespace(num_processes=1)
HOLD = "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX); "
HOLD += "f.write('process 7 on there\\n'); f.flush(); print('held', flush=True); sys.stdin.read()"


def run_in(output_dir: Path, writes: bool = True) -> Any:
    return SimpleNamespace(output_dir=output_dir, should_save=writes)


@pytest.fixture
def other_run(tmp_path):
    """A process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / LOCK)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_directory_of_a_run_is_refused_to_another_until_that_has_died(tmp_path, other_run):
    with (
        pytest.raises(ValueError, match=r"in use by another run \(process 7 on there\): choose"),
        locked(run_in(tmp_path), ALONE),
    ):
        pass
    other_run.kill()
    other_run.wait()
    with locked(run_in(tmp_path), ALONE):
        assert f"process {os.getpid()} on" in (tmp_path / LOCK).read_text()


def test_it_is_free_again_after_the_run(tmp_path):
    for _ in range(2):
        with locked(run_in(tmp_path / "new"), ALONE):
            pass


def test_a_process_that_does_not_write_needs_none(tmp_path, other_run):
    with locked(run_in(tmp_path, writes=False), ALONE):
        pass


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(run_in(tmp_path), ALONE):
        pass
    assert "cannot be locked (No locks available)" in caplog.text


def taken(output_dir: Path) -> bool:
    """Whether another process finds the lock held."""
    path = str(output_dir / LOCK)
    take = f"import fcntl; fcntl.flock(open({path!r}), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    return bool(subprocess.run([sys.executable, "-c", take], capture_output=True).returncode)


def test_the_lock_stays_though_its_file_is_read_and_the_process_tries_again(tmp_path):
    """Locks of lockf() end with the first close of the file in the process that holds them."""
    with locked(run_in(tmp_path), ALONE):
        (tmp_path / LOCK).read_text()  # as the upload of an output_dir does
        with (
            pytest.raises(ValueError, match="in use by another run"),
            locked(run_in(tmp_path), ALONE),
        ):
            pass
        assert taken(tmp_path)
    assert not taken(tmp_path)
    assert (tmp_path / LOCK).read_text() == ""


def test_a_forked_process_that_lives_longer_does_not_hold_it(tmp_path):
    with locked(run_in(tmp_path), ALONE):
        child = os.fork()
        if child == 0:
            signal.pause()
        assert taken(tmp_path)
    assert not taken(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_lock_that_cannot_be_opened_is_refused_not_raised(tmp_path):
    """On every process: the others wait for the one that locks."""
    (tmp_path / LOCK).mkdir()
    said = r"cannot be opened \(Is a directory\): choose another"
    with pytest.raises(ValueError, match=said), locked(run_in(tmp_path), ALONE):
        pass


def test_what_a_killed_run_left_is_put_back_or_deleted(tmp_path):
    (tmp_path / ".incomplete/1f/replaced-checkpoint-4").mkdir(parents=True)
    (tmp_path / ".incomplete/1f/checkpoint-6").mkdir()
    with locked(run_in(tmp_path), ALONE):
        assert names(tmp_path) == ["checkpoint-4"]


def test_two_runs_without_locks_publish_whole_checkpoints(tmp_path, monkeypatch):
    """The second run saves, and deletes, while the first is in the middle of a save."""

    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    first, second = (make_trainer(tmp_path, save_total_limit=1) for _ in range(2))
    save = first._save_rng_state

    def interrupted(directory: str) -> None:
        if first.state.global_step == 3:
            second.train()
        save(directory)

    monkeypatch.setattr(first, "_save_rng_state", interrupted)
    first.train()
    assert first.checkpoints.num_failed == second.checkpoints.num_failed == 0
    assert names(tmp_path) == ["checkpoint-6"]
    find_checkpoint(True, str(tmp_path), first.parallel)


def test_a_run_is_refused_before_its_first_step(tmp_path, other_run):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="in use by another run"):
        trainer.train()
    assert trainer.state.global_step == 0
