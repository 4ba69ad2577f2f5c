"""Every kind of damage to every file of a checkpoint is refused, by the file's name.

`python -m tests.checkpoint.test_manifest` prints what is said of each.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rloo_fast.checkpoint.files import find_checkpoint
from rloo_fast.checkpoint.manifest import MANIFEST
from tests.support.damage import ALONE, DAMAGES, make_up_manifest, of_another_step, plant
from tests.support.interrupted import weights_of
from tests.support.kill_resume import make_trainer
from tests.support.tiny import make_model

ONE: Any = SimpleNamespace(name="DDP", checkpoints_are_tied=False, accelerator=ALONE)
REQUIRED = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
REQUIRED += ["trainer_state.json", "rloo_launch.json", "rloo_state_0.pt", "training_args.bin"]
REQUIRED += ["config.json", MANIFEST]


KINDS = {**DAMAGES, "of another step": of_another_step}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, max_steps=2, save_steps=1).train()
    return folder


def said_of(run: Path, folder: Path, name: str, damage: str) -> str:
    """What resuming says once the file has the damage; "" if it went on."""
    shutil.copytree(run, folder)
    KINDS[damage](folder / "checkpoint-2" / name)
    trainer = make_trainer(folder, max_steps=3, save_strategy="no", model=make_model(seed=1))
    before = weights_of(trainer)
    try:
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    except ValueError as error:
        after = weights_of(trainer)
        assert all(torch.equal(before[name], weight) for name, weight in after.items())
        return str(error)
    return ""


@pytest.mark.parametrize("damage", KINDS)
def test_a_damaged_checkpoint_is_refused_by_the_name_of_the_file(run, tmp_path, damage):
    files = [p.name for p in (run / "checkpoint-2").iterdir()]
    assert set(REQUIRED) <= set(files)
    for name in files:
        same = (run / "checkpoint-1" / name).read_bytes() == (
            run / "checkpoint-2" / name
        ).read_bytes()
        if damage == "of another step" and same:
            continue
        said = said_of(run, tmp_path / name, name, damage)
        assert name in said, said
        assert said.count(". ") <= 2


def planted(run: Path, folder: Path, name: str) -> str:
    """What resuming says of a checkpoint that somebody made up, with a file that runs code."""
    checkpoint = folder / "checkpoint-2"
    shutil.copytree(run / "checkpoint-2", checkpoint)
    plant(checkpoint / name, folder / "ran")
    make_up_manifest(checkpoint)
    trainer = make_trainer(folder, max_steps=2, save_strategy="no", model=make_model(seed=1))
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    except ValueError as error:
        return str(error)
    finally:
        assert not (folder / "ran").exists()
    return ""


PICKLED = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "rloo_state_0.pt", "training_args.bin"]


@pytest.mark.parametrize("name", PICKLED)
def test_a_file_that_would_run_code_is_refused(run, tmp_path, name):
    said = planted(run, tmp_path, name)
    if name == "training_args.bin":  # nothing ever loads it
        assert not said
    else:
        assert f"{name} holds io.open, which is no data and could run code. Resume from" in said


OTHERS: dict[str, Callable[[Path], object]] = {
    "trainer_state.json": lambda path: path.write_text("{}"),
    "the state of optimizer or scheduler": lambda path: torch.save({}, path / "optimizer.pt"),
    "rng_state*.pth": lambda path: torch.save({}, path / "rng_state.pth"),
    "rloo_state_*.pt": lambda path: torch.save({}, path / "rloo_state_0.pt"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_other_versions_are_refused_by_name(run, tmp_path, name):
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(run / "checkpoint-2", checkpoint)
    OTHERS[name](checkpoint / name if name.endswith(".json") else checkpoint)
    make_up_manifest(checkpoint)
    trainer = make_trainer(tmp_path, max_steps=3, save_strategy="no")
    with pytest.raises(ValueError, match=f"^{re.escape(name)} of .* holds something else than"):
        trainer.train(str(checkpoint))


@pytest.mark.parametrize(
    "names", [{"../secret": [4, "x"]}, {"/etc/passwd": [4, "x"]}, {"a": 7}, [], 7, {"a": ["b", 1]}]
)
def test_a_manifest_that_was_made_up_reads_no_other_files(run, tmp_path, names):
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(run / "checkpoint-2", checkpoint)
    body = {"step": 2, "files": names}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (checkpoint / MANIFEST).write_text(json.dumps({**body, "digest": digest}))
    with pytest.raises(ValueError, match=f"{MANIFEST} is damaged"):
        find_checkpoint(str(checkpoint), str(tmp_path), ONE)


def test_a_pipe_in_a_files_place_is_not_waited_for(run, tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(run / "checkpoint-2", checkpoint)
    (checkpoint / "README.md").unlink()
    os.mkfifo(checkpoint / "README.md")
    with pytest.raises(ValueError, match=r"README.md is no file"):
        find_checkpoint(str(checkpoint), str(tmp_path), ONE)


def test_a_checkpoint_under_another_name_is_refused(run, tmp_path):
    shutil.copytree(run / "checkpoint-1", tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="it is the checkpoint of step 1 under another name"):
        make_trainer(tmp_path).train(str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_may_be_moved_and_have_other_files_beside_it(run, tmp_path):
    shutil.copytree(run / "checkpoint-1", tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").write_text("the good one")
    make_trainer(tmp_path, max_steps=2).train(str(tmp_path / "mine"))


def test_a_file_that_is_missing_when_it_is_written_is_no_checkpoint(tmp_path, monkeypatch, caplog):
    """As when another run deletes it."""
    trainer = make_trainer(tmp_path, max_steps=1, save_steps=1)
    save = trainer._save_rng_state
    monkeypatch.setattr(
        trainer, "_save_rng_state", lambda path: (save(path), Path(path, "rng_state.pth").unlink())
    )
    trainer.train()
    assert not (tmp_path / "checkpoint-1").exists()
    assert "it holds no rng_state.pth" in caplog.text


def test_the_manifest_names_every_other_file(run):
    checkpoint = run / "checkpoint-2"
    saved = json.loads((checkpoint / MANIFEST).read_text())
    assert saved["step"] == 2
    assert set(saved["files"]) == {path.name for path in checkpoint.iterdir()} - {MANIFEST}


def table() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        make_trainer(run, max_steps=2, save_steps=1).train()
        for name in sorted(path.name for path in (run / "checkpoint-2").iterdir()):
            for damage in KINDS:
                said = said_of(run, Path(folder, f"{name}-{damage}"), name, damage)
                said = said.replace(folder, "").split(" Resume from")[0]
                print(f"{name:24} {damage:16} {said or 'the same file: goes on'}")
        for name in PICKLED:
            said = planted(run, Path(folder, f"{name}-planted"), name).replace(folder, "")
            print(f"{name:24} {'a payload':16} {said.split(' Resume from')[0] or 'never loaded'}")


if __name__ == "__main__":
    table()
