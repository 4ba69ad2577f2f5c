"""Checkpoint directories: found, refused, renamed, deleted."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rloo_fast.checkpoint.files import (
    check_launch_of,
    find_checkpoint,
    publish,
    rotate,
    save_launch,
)
from tests.support.interrupted import names, weights_of
from tests.support.kill_resume import make_trainer
from tests.support.tiny import make_model


def fake_checkpoint(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text("{}")
    save_launch(path, launch(), completions_wait=False, optimizer={})
    return path


def launch(engine: str = "DDP", num_processes: int = 1, tied: bool = False) -> Any:
    """Who saves a checkpoint, or resumes from it."""
    return SimpleNamespace(
        name=engine,
        checkpoints_are_tied=tied,
        accelerator=SimpleNamespace(num_processes=num_processes),
    )


def test_the_newest_complete_checkpoint_is_found(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", ".incomplete/1f/checkpoint-11", "other-12"):
        fake_checkpoint(tmp_path / name)

    assert find_checkpoint(True, str(tmp_path)) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("resume", [None, False])
def test_no_checkpoint_is_looked_for_unless_asked(tmp_path, resume):
    fake_checkpoint(tmp_path / "checkpoint-9")

    assert find_checkpoint(resume, str(tmp_path)) is None


@pytest.mark.parametrize("exists", [True, False])
def test_resuming_where_there_is_no_checkpoint_is_refused(tmp_path, exists):
    if exists:
        fake_checkpoint(tmp_path / "run/.incomplete/1f/checkpoint-1")

    with pytest.raises(ValueError, match="holds no checkpoint: start without it, or give"):
        find_checkpoint(True, str(tmp_path / "run"))


@pytest.mark.parametrize("name", ["nothing", "empty", ".incomplete/1f/checkpoint-2"])
def test_resuming_from_what_is_no_checkpoint_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    fake_checkpoint(tmp_path / ".incomplete/1f/checkpoint-2")

    with pytest.raises(ValueError, match=f"{name}' is not a complete checkpoint: give a directory"):
        find_checkpoint(str(tmp_path / name), str(tmp_path))


@pytest.mark.parametrize("resume", [True, "checkpoint-3"])
def test_resuming_from_weights_alone_is_refused_before_anything_is_loaded(tmp_path, resume):
    make_trainer(tmp_path, save_only_model=True, max_steps=3).train()
    trainer = make_trainer(tmp_path, model=make_model(seed=1))
    before = weights_of(trainer)

    with pytest.raises(ValueError, match="save_only_model=True, and cannot be resumed from"):
        trainer.train(str(tmp_path / resume) if isinstance(resume, str) else resume)

    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(trainer).items())


@pytest.mark.parametrize(
    ("saved", "wait", "now", "why"),
    [
        (launch("FSDP2", 2), False, launch(), "saved with FSDP2 and cannot be resumed with DDP"),
        (launch("ZeRO-3", 2), False, launch("ZeRO-2", 2, tied=True), "launch with ZeRO-3, or give"),
        (
            launch("ZeRO-3", 2),
            False,
            launch("ZeRO-3", 4, tied=True),
            "with ZeRO-3 by 2 processes and cannot be resumed by 4: launch 2, or give",
        ),
        (launch(num_processes=2), True, launch(), "dealt out to 2 processes, which 1 cannot"),
    ],
)
def test_a_checkpoint_of_another_launch_is_refused(tmp_path, saved, wait, now, why):
    path = fake_checkpoint(tmp_path / "checkpoint-1")
    save_launch(path, saved, wait, {})

    with pytest.raises(ValueError, match=why):
        find_checkpoint(str(path), str(tmp_path), now)


def test_other_launches_go_on_where_the_engine_allows(tmp_path):
    path = fake_checkpoint(tmp_path / "checkpoint-1")
    for saved, wait, now in (
        (launch("FSDP2", 2), False, launch("FSDP2", 4)),
        (launch("FSDP2", 2), True, launch("FSDP2", 2)),
        (launch("ZeRO-3", 2), True, launch("ZeRO-3", 2, tied=True)),
    ):
        save_launch(path, saved, wait, {})
        check_launch_of(path, now)


def test_other_batch_sizes_are_refused_while_completions_wait(tmp_path):
    make_trainer(tmp_path, num_iterations=2, max_steps=3).train()
    trainer = make_trainer(tmp_path, num_iterations=2, per_device_train_batch_size=8)

    with pytest.raises(ValueError, match=r"\[4, 1, 2\], but now they are \[8, 1, 2\]"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("below", ["run", "deep/run"])
def test_an_output_dir_that_cannot_be_written_to_is_named(tmp_path, below):
    (tmp_path / "file").write_text("")
    output_dir = tmp_path / "file" / below

    with pytest.raises(ValueError, match=f"output_dir '{output_dir}' cannot be written to"):
        make_trainer(output_dir)


def test_an_output_dir_without_a_name_is_refused():
    with pytest.raises(ValueError, match="output_dir is empty: name a directory"):
        make_trainer("")


def test_a_replacement_cut_between_its_renames_is_undone(tmp_path):
    fake_checkpoint(tmp_path / "checkpoint-2")
    fake_checkpoint(tmp_path / ".incomplete/1f/replaced-checkpoint-4")
    fake_checkpoint(tmp_path / ".incomplete/1f/checkpoint-4")

    assert find_checkpoint(True, str(tmp_path)) == str(tmp_path / "checkpoint-4")


def test_a_checkpoint_survives_a_replacement_that_fails(tmp_path):
    final = fake_checkpoint(tmp_path / "checkpoint-4")
    (tmp_path / ".incomplete/1f").mkdir(parents=True)

    with pytest.raises(OSError, match="checkpoint-4"):
        publish(tmp_path / ".incomplete/1f/checkpoint-4", final)  # never written

    assert (final / "trainer_state.json").exists()


@pytest.mark.parametrize(
    ("limit", "newest", "best", "left"),
    [
        (2, 8, None, [6, 8]),
        (2, 8, 2, [2, 8]),
        (1, 8, 2, [2, 8]),
        (1, 8, 8, [8]),
        (1, 8, 99, [8]),  # the best one is gone
        (2, 4, None, [2, 4]),  # 6 and 8 are an earlier run's
        (None, 8, None, [2, 4, 6, 8]),
    ],
)
def test_save_total_limit_keeps_the_newest_and_the_best(tmp_path, limit, newest, best, left):
    for step in (2, 4, 6, 8):
        fake_checkpoint(tmp_path / f"checkpoint-{step}")
    best_path = best and os.path.relpath(tmp_path / f"checkpoint-{best}")

    rotate(
        tmp_path, tmp_path / ".incomplete/1f", limit, tmp_path / f"checkpoint-{newest}", best_path
    )

    assert [n for n in names(tmp_path) if n != ".incomplete"] == [f"checkpoint-{n}" for n in left]
