"""A checkpoint is complete or absent, and a save that fails costs no more than itself."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers.utils.hub import PushInProgress

from rloo_fast.checkpoint import writer as checkpoint
from rloo_fast.checkpoint.files import LAUNCH
from tests.support.interrupted import (
    BEST,
    At,
    Crash,
    assert_same_run,
    block_saves,
    crash_in,
    names,
    renamed_head,
    weights_of,
)
from tests.support.kill_resume import make_trainer
from tests.support.tiny import make_model


def test_nothing_but_the_limited_number_of_checkpoints_is_left(tmp_path):
    make_trainer(tmp_path, save_steps=1, save_total_limit=2).train()

    assert names(tmp_path) == ["checkpoint-5", "checkpoint-6"]


def test_saved_arguments_are_those_of_the_run(tmp_path):
    make_trainer(tmp_path, save_total_limit=2, max_steps=1).train()

    saved = torch.load(tmp_path / "checkpoint-1/training_args.bin", weights_only=False)

    assert saved.save_total_limit == 2


def test_a_checkpoint_is_pushed_from_where_it_stays(tmp_path, monkeypatch):
    pushed = []

    def push(self: Any, folder: str) -> None:
        pushed.append((folder, (Path(folder) / LAUNCH).exists()))

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.args.push_to_hub = True
    trainer.train()

    assert pushed == [(str(tmp_path / "checkpoint-3"), True)]


class KeepWeights(TrainerCallback):
    """The weights at every step's end."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert model is not None
        self.at[state.global_step] = {n: t.clone() for n, t in model.state_dict().items()}


@pytest.mark.parametrize("model", [make_model, renamed_head])
def test_the_best_weights_are_loaded_at_the_end(tmp_path, model):
    trainer, kept = make_trainer(tmp_path, **BEST, model=model()), KeepWeights()
    trainer.add_callback(kept)
    trainer.train()

    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    assert all(torch.equal(kept.at[4][name], t) for name, t in weights_of(trainer).items())
    assert not torch.equal(kept.at[4]["lm_head.weight"], kept.at[6]["lm_head.weight"])


@pytest.mark.parametrize("step", [4, 6])
def test_a_checkpoint_names_the_best_one_where_it_lies(tmp_path, step):
    make_trainer(tmp_path, **BEST).train()

    state = json.loads((tmp_path / f"checkpoint-{step}/trainer_state.json").read_text())

    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-4")
    assert state["best_global_step"] == 4


def test_a_moved_output_dir_keeps_its_best_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path / "old", **BEST)
    trainer.add_callback(crash_in(5))
    with pytest.raises(Crash):
        trainer.train()
    (tmp_path / "old").rename(tmp_path / "new")

    resumed = make_trainer(tmp_path / "new", **BEST)
    resumed.train(resume_from_checkpoint=True)

    assert resumed.state.best_model_checkpoint == str(tmp_path / "new/checkpoint-4")
    assert names(tmp_path / "new") == ["checkpoint-4", "checkpoint-6"]


def test_a_best_checkpoint_that_could_not_be_saved_is_not_the_best(tmp_path):
    trainer = make_trainer(tmp_path, **BEST)
    trainer.add_callback(block_saves(tmp_path, range(4, 5)))
    trainer.train()

    assert trainer.checkpoints.num_failed == 1
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-6")


def test_a_best_checkpoint_lost_in_its_last_fsync_leaves_the_former_one(tmp_path, monkeypatch):
    def sync_tree(root: Path) -> None:
        if root.name == "checkpoint-4":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint, "sync_tree", sync_tree)
    trainer = make_trainer(tmp_path, **{**BEST, "max_steps": 4})
    trainer.train()

    assert names(tmp_path) == ["checkpoint-2"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")


def test_a_failed_save_is_reported_and_the_run_goes_on(tmp_path, caplog):
    trainer = make_trainer(tmp_path, save_steps=1)
    trainer.add_callback(block_saves(tmp_path, range(3, 5)))
    trainer.train()

    assert trainer.checkpoints.num_failed == 2
    assert names(tmp_path) == [f"checkpoint-{n}" for n in (1, 2, 5, 6)]
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 2
    assert errors[0].startswith("checkpoint-3 could not be saved (")
    assert errors[0].endswith("Training goes on; the newest checkpoint is checkpoint-2.")


@pytest.fixture
def small_disk(tmp_path):
    """resize(KiB) of a disk of its own at the returned path."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "rloo_fast_test", str(path)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip(
            "no right to mount a small disk; test_train_resume limits the file size instead"
        )

    def resize(kib: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kib}k", str(path)], check=True)

    yield path, resize
    if subprocess.run(["umount", str(path)]).returncode:
        subprocess.run(["umount", "-l", str(path)], check=True)
        pytest.fail("a file of a save that failed is still open: its space is not free")


def test_a_full_disk_costs_checkpoints_only_while_it_is_full(small_disk, tmp_path):
    path, resize = small_disk
    settings = {"save_steps": 1, "save_total_limit": 1}
    reference = make_trainer(tmp_path / "reference", **settings)
    reference.train()
    output_dir = path / "run"
    trainer = make_trainer(output_dir, **settings)

    def action(step: int) -> None:
        used = shutil.disk_usage(path).used // 1024
        if step == 2:
            resize(used + used // 2)  # one checkpoint fits, a second one beside it does not
        if step == 4:
            assert names(output_dir) == ["checkpoint-1"]
            resize(8192)

    trainer.add_callback(At(action))
    trainer.train()

    assert trainer.checkpoints.num_failed == 2
    assert names(output_dir) == ["checkpoint-6"]
    assert_same_run(trainer, reference)


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The directory for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


def test_a_last_save_that_failed_is_tried_again(tmp_path, temporary, monkeypatch):
    tries = []

    def sync_tree(root: Path) -> None:
        tries.append(root.name)
        if tries == ["checkpoint-3", "checkpoint-6"]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint, "sync_tree", sync_tree)
    trainer = make_trainer(tmp_path / "run")
    trainer.train()

    assert names(tmp_path / "run") == ["checkpoint-3", "checkpoint-6"]
    assert trainer.checkpoints.failed_step is None
    assert not names(temporary)


def test_a_last_save_that_has_no_place_is_kept_elsewhere(tmp_path, temporary, caplog):
    """And what was trained since the last checkpoint goes on from there, exactly."""
    reference = make_trainer(tmp_path / "reference", max_steps=8, lr_scheduler_type="constant")
    reference.train()
    trainer = make_trainer(tmp_path / "run", max_steps=7, lr_scheduler_type="constant")
    trainer.add_callback(block_saves(tmp_path / "run", range(7, 99)))
    trainer.train()

    assert names(tmp_path / "run") == ["checkpoint-3", "checkpoint-6"]
    (folder,) = temporary.iterdir()
    assert names(folder) == ["checkpoint-7"]
    assert f"checkpoint-7 is in {folder}, not in {tmp_path / 'run'}: move it there" in caplog.text
    assert trainer.checkpoints.failed_step == 7
    resumed = make_trainer(tmp_path / "run", max_steps=8, lr_scheduler_type="constant")
    (tmp_path / "run/.incomplete").unlink()
    resumed.train(str(folder / "checkpoint-7"))
    assert_same_run(resumed, reference)


def test_the_best_weights_are_loaded_though_the_last_ones_have_no_place(tmp_path, temporary):
    trainer, kept = make_trainer(tmp_path / "run", **BEST), KeepWeights()
    trainer.add_callback(kept)
    trainer.add_callback(block_saves(tmp_path / "run", range(6, 99)))
    trainer.train()

    assert names(next(temporary.iterdir())) == ["checkpoint-6"]
    assert all(torch.equal(kept.at[4][name], t) for name, t in weights_of(trainer).items())


def test_what_can_be_saved_nowhere_is_said(tmp_path, temporary, caplog):
    trainer = make_trainer(tmp_path / "run")
    trainer.add_callback(block_saves(tmp_path / "run", range(6, 99)))
    trainer.add_callback(At(lambda step: step == 6 and temporary.rmdir()))
    trainer.train()

    assert names(tmp_path / "run") == ["checkpoint-3"]
    assert "what was trained since checkpoint-3 is in no checkpoint" in caplog.text


def test_the_steps_before_a_failure_are_kept_elsewhere(tmp_path, temporary):
    def fails_in_step_5(completions, trainer_state, **_):
        if trainer_state.global_step == 4:
            raise KeyError("answer")
        return [1.0] * len(completions)

    trainer = make_trainer(tmp_path / "run", fails_in_step_5)
    trainer.add_callback(block_saves(tmp_path / "run", range(5, 99)))
    with pytest.raises(Exception, match="answer") as raised:
        trainer.train()

    (folder,) = temporary.iterdir()
    assert raised.value.__notes__[-1] == (
        f"The 4 steps done are in {folder / 'checkpoint-4'}: resume from it."
    )


def test_old_checkpoints_that_cannot_be_deleted_stay(tmp_path, monkeypatch, caplog):
    def rotate(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(checkpoint, "rotate", rotate)
    trainer = make_trainer(tmp_path, save_total_limit=1)
    trainer.train()

    assert names(tmp_path) == ["checkpoint-3", "checkpoint-6"]
    assert trainer.checkpoints.num_failed == 0
    assert "Old checkpoints could not be deleted ([Errno 13] Permission denied)" in caplog.text


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_push_that_fails_costs_the_run_nothing(tmp_path, monkeypatch, caplog, when):
    def push(self: Any, folder: str) -> None:
        if when == "at once":
            raise ConnectionError("no route to the Hub")
        job: Any = Future()
        job.set_exception(ConnectionError("no route to the Hub"))
        jobs: Any = [job]  # transformers says that it takes one
        self.push_in_progress = PushInProgress(jobs)

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    trainer = make_trainer(tmp_path)
    trainer.args.push_to_hub = True
    trainer.train()

    assert names(tmp_path) == ["checkpoint-3", "checkpoint-6"]
    assert "could not be pushed to the Hub (ConnectionError: no route to the Hub)" in caplog.text


def test_a_repository_that_cannot_be_made_is_said_as_such(tmp_path, monkeypatch):
    def no_hub(self: Any, token: str | None = None) -> None:
        raise OSError("401 for hf_abcdefghijklmnop1234")

    monkeypatch.setattr(Trainer, "init_hf_repo", no_hub)
    sentence = r"push_to_hub: the repository 'me/it' cannot .* \(OSError: 401 for <masked>\)"
    with pytest.raises(ValueError, match=sentence):
        make_trainer(tmp_path, push_to_hub=True, hub_model_id="me/it")
