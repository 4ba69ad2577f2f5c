"""Checkpoint directories: found, checked, renamed, deleted. Several machines need a shared one.

A checkpoint is written under `<output_dir>/.incomplete/<run>/` and renamed to `checkpoint-N` when
every file of every process is on the disk; an old one is renamed into it before it is deleted.
`<run>` is drawn at random: process numbers repeat on other machines and in other containers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from ..config.json_text import parse_json
from ..distributed import TrainingEngine
from .manifest import REMEDY, check_manifest

INCOMPLETE = ".incomplete"
REPLACED = "replaced-"
LAUNCH = "rloo_launch.json"


def state_file(rank: int | str) -> str:
    return f"rloo_state_{rank}.pt"


def check_present(checkpoint: Path, num_processes: int) -> None:
    """Raise OSError unless the files that every engine's checkpoint has are there."""
    ranks = range(num_processes)
    names = ["trainer_state.json", LAUNCH, "scheduler.pt", *(state_file(rank) for rank in ranks)]
    names += ["rng_state.pth"] if num_processes == 1 else [f"rng_state_{r}.pth" for r in ranks]
    missing = [name for name in names if not (checkpoint / name).is_file()]
    if missing:
        raise OSError(f"it holds no {', '.join(missing)}")


def check_output_dir(output_dir: str) -> None:
    """Raise ValueError unless files can be created in `output_dir` (made if missing)."""
    if not output_dir:
        raise ValueError("output_dir is empty: name a directory for checkpoints and the model.")
    path = Path(output_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f"output_dir {output_dir!r} cannot be written to ({error.strerror}): choose another."
        ) from error


def step_of(checkpoint: Path) -> int:
    """N of `checkpoint-N`, -1 for a directory of another name."""
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else -1


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint-N directories of `run_dir` by step; none where it cannot be read."""
    found: list[Path] = []
    with suppress(OSError):
        found = [path for path in run_dir.iterdir() if step_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=step_of)


def find_checkpoint(
    resume: str | bool | None, output_dir: str, parallel: TrainingEngine | None = None
) -> str | None:
    """The checkpoint to resume from: a directory as given, or with True the newest of output_dir.

    Raises ValueError where there is none, or it cannot be resumed from (by the processes and with
    the engine of `parallel`).
    """
    if resume is None or resume is False:
        return None
    put_back(Path(output_dir) if resume is True else Path(resume).parent)
    if resume is True:
        found = checkpoints(Path(output_dir))
        if not found:
            raise ValueError(
                f"resume_from_checkpoint=True, but {output_dir!r} holds no checkpoint: start "
                "without it, or give the checkpoint's directory."
            )
        path = found[-1]
    else:
        path = Path(resume)
    if INCOMPLETE in path.resolve().parts or not (path / "trainer_state.json").is_file():
        given = str(path) if resume is True else resume
        raise ValueError(
            f"resume_from_checkpoint={given!r} is not a complete checkpoint: give a directory "
            "checkpoint-N with a trainer_state.json in it."
        )
    if not (path / LAUNCH).is_file():
        raise ValueError(
            f"{str(path)!r} holds no {LAUNCH}: it was saved by another trainer or with "
            "save_only_model=True, and cannot be resumed from. Load its weights as the model."
        )
    if parallel is not None:
        check_launch_of(path, parallel)
        check_manifest(path, parallel.accelerator)
        check_trainer_state(path)
    return str(path)


def save_launch(
    checkpoint: Path, parallel: TrainingEngine, completions_wait: bool, optimizer: dict[str, Any]
) -> None:
    """`optimizer`: its settings, as `optimizer_settings` returns them."""
    launch = {
        "engine": parallel.name,
        "num_processes": parallel.accelerator.num_processes,
        "completions_wait": completions_wait,
        "optimizer": optimizer,
    }
    (checkpoint / LAUNCH).write_text(json.dumps(launch) + "\n")


def load_launch(checkpoint: Path) -> dict[str, Any]:
    """What save_launch() wrote: engine, num_processes, completions_wait, optimizer.

    Raises ValueError for a damaged file.
    """
    try:
        launch = parse_json((checkpoint / LAUNCH).read_text())
        names = ("engine", "num_processes", "completions_wait", "optimizer")
        return {name: launch[name] for name in names}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{str(checkpoint / LAUNCH)!r} is damaged. {REMEDY}") from error


def check_launch_of(checkpoint: Path, parallel: TrainingEngine) -> None:
    """Raise ValueError unless the run can resume what another launch has saved."""
    saved, name = load_launch(checkpoint), f"{str(checkpoint)!r}"
    engine, num_saved = saved["engine"], saved["num_processes"]
    if engine != parallel.name:
        raise ValueError(
            f"{name} was saved with {engine} and cannot be resumed with {parallel.name}: launch "
            f"with {engine}, or give the directory as the model, to start from its weights."
        )
    now = parallel.accelerator.num_processes
    if now == num_saved:
        return
    if parallel.checkpoints_are_tied:
        raise ValueError(
            f"{name} was saved with {engine} by {num_saved} processes and cannot be resumed by "
            f"{now}: launch {num_saved}, or give the directory as the model, to start from its "
            "weights."
        )
    if saved["completions_wait"]:
        raise ValueError(
            f"{name} holds completions still to be used, dealt out to {num_saved} processes, which "
            f"{now} cannot take over: launch {num_saved}, or give a checkpoint of a step after "
            "which none wait (with num_iterations=1, or at the end of an epoch)."
        )


def put_back(run_dir: Path) -> None:
    """Undo a replacement (see `publish`) that was cut between its two renames."""
    for old in (run_dir / INCOMPLETE).glob(f"*/{REPLACED}checkpoint-*"):
        final = run_dir / old.name.removeprefix(REPLACED)
        if not final.exists():
            with suppress(OSError):  # another process was faster
                os.rename(old, final)


def clear(scratch: Path) -> None:
    """Delete what this run writes checkpoints under."""
    shutil.rmtree(scratch, ignore_errors=True)
    with suppress(OSError):  # another run's is in it, or it is not there
        scratch.parent.rmdir()


def clear_left(run_dir: Path) -> None:
    """Delete what runs that were killed have left, for one that is alone in `run_dir`."""
    put_back(run_dir)
    shutil.rmtree(run_dir / INCOMPLETE, ignore_errors=True)


@contextmanager
def reading(checkpoint: str | Path, what: str) -> Iterator[None]:
    """Around what reads `what` of a checkpoint that may be another version's, or made up: what it
    raises where the content is another than expected becomes a ValueError.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{what} of {str(checkpoint)!r} holds something else than these versions of rloo_fast "
            f"and transformers read ({type(error).__name__}: {error}). {REMEDY}"
        ) from error


def check_trainer_state(checkpoint: Path) -> None:
    """Raise ValueError unless transformers can go on from the trainer_state.json."""
    with reading(checkpoint, "trainer_state.json"):
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        for name in ("global_step", "max_steps", "train_batch_size", "epoch"):
            value = getattr(state, name)
            if not isinstance(value, int | float) or not value > 0:
                raise TypeError(f"{name} is {value!r}")


def load_state(checkpoint: str, rank: int) -> dict[str, Any]:
    """What run_state() returned on this process when the checkpoint was saved."""
    path = Path(checkpoint) / state_file(rank)
    return torch.load(path, map_location="cpu", weights_only=True)


def sync_tree(root: Path) -> None:
    """Flush every file and directory below `root` to the disk."""
    for directory, _, files in os.walk(root):
        for name in [*files, "."]:
            descriptor = os.open(os.path.join(directory, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def publish(written: Path, final: Path) -> None:
    """Move a complete checkpoint to its place; one of that name is replaced."""
    replaced = written.with_name(REPLACED + final.name)
    if final.exists():
        os.rename(final, replaced)
    try:
        os.rename(written, final)
    except OSError:
        if replaced.exists():
            os.rename(replaced, final)
        raise
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rotate(run_dir: Path, scratch: Path, limit: int | None, newest: Path, best: str | None) -> None:
    """Keep `limit` checkpoints: `newest`, the best one, and what was saved last before. The others
    are moved to `scratch`, to be deleted.

    Those of later steps than `newest` are left from a run that was resumed from an earlier one, so
    they are the first to go.
    """
    if limit is None or limit <= 0:
        return
    found = checkpoints(run_dir)
    found.sort(key=lambda path: (step_of(path) <= step_of(newest), step_of(path)))
    protected = {newest.resolve(), Path(best).resolve() if best else newest.resolve()}
    kept = [path for path in found if path.resolve() in protected]
    excess = len(found) - max(limit, len(kept))
    for path in [path for path in found if path not in kept][: max(excess, 0)]:
        # half a deleted checkpoint must not look like one
        scratch.mkdir(parents=True, exist_ok=True)
        os.rename(path, scratch / f"deleted-{path.name}")
