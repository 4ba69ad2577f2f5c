"""Checkpoints that are complete or absent, and resumes that repeat the uninterrupted run.

A checkpoint is written under `<output_dir>/.incomplete/` and renamed to `checkpoint-N` when every
file of every process is on the disk. Beside what transformers saves (weights, optimizer, scheduler,
random states, TrainerState) it holds `rloo_state_<rank>.pt`: completions still to be used, metrics
and losses not yet logged, a reference model that moves.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

logger = logging.getLogger(__name__)

INCOMPLETE = ".incomplete"


def state_file(rank: int) -> str:
    return f"rloo_state_{rank}.pt"


def check_output_dir(output_dir: str) -> None:
    """Raise ValueError unless files can be created in `output_dir` (made if missing)."""
    path = Path(output_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"output_dir {output_dir!r} cannot be written to ({error.strerror}): choose another."
        ) from error


def find_checkpoint(resume: str | bool | None, output_dir: str) -> str | None:
    """The checkpoint to resume from: a directory as given, or with True the newest of output_dir.

    Raises ValueError where there is none, or the directory is no complete checkpoint.
    """
    if resume is None or resume is False:
        return None
    if resume is True:
        newest = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
        if newest is None:
            raise ValueError(
                f"resume_from_checkpoint=True, but {output_dir!r} holds no checkpoint: start "
                "without it, or give the checkpoint's directory."
            )
        return newest
    path = Path(resume)
    if not (path / "trainer_state.json").is_file():
        raise ValueError(f"resume_from_checkpoint={resume!r} is not a complete checkpoint.")
    return str(path)


def load_state(checkpoint: str, rank: int) -> dict[str, Any]:
    path = Path(checkpoint) / state_file(rank)
    if not path.is_file():
        raise ValueError(
            f"{checkpoint!r} holds no {path.name}: it was not saved by this trainer on at least "
            f"{rank + 1} processes, or with save_only_model=True. Load its weights as the model "
            "instead of resuming."
        )
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
    if final.exists():
        old = written.parent / f"replaced-{final.name}"
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(written, final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    shutil.rmtree(written.parent, ignore_errors=True)


class Termination:
    """While active, SIGTERM asks for a save and a clean end instead of killing the process."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> Termination:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def _request(self, *_: Any) -> None:
        self.requested = True

    def __exit__(self, *_: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None


class CheckpointMixin:
    """Trainer methods that save and restore; the trainer provides run_state() and its inverse."""

    num_failed_saves = 0
    _saving_root: str | None = None
    _push_requested = False

    def _get_output_dir(self, trial: Any) -> str:
        return self._saving_root or super()._get_output_dir(trial)  # pyright: ignore

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write beside, then rename. A failed write is reported; training and old checkpoints
        stay."""
        run_dir = Path(super()._get_output_dir(trial))  # pyright: ignore
        root, name = run_dir / INCOMPLETE, f"checkpoint-{self.state.global_step}"  # pyright: ignore
        if not (
            self._all_succeed(name, lambda: self._make_room(root))
            and self._all_succeed(name, lambda: self._write_checkpoint(model, trial, root, name))
            and self._all_succeed(name, lambda: self._publish(root, run_dir, name))
        ):
            self._make_room(root)
            return
        if self._push_requested:
            self._push_from_checkpoint(str(run_dir / name))  # pyright: ignore

    def _all_succeed(self, name: str, action: Callable[[], None]) -> bool:
        """Run `action`; True if it raised on no process. A failure is logged, not raised."""
        error = None
        try:
            action()
        except Exception as failure:  # the disk may fill in any of a dozen libraries
            error = failure
        failed = self._any_process(error is not None)
        if failed:
            self.num_failed_saves += 1
            newest = get_last_checkpoint(self.args.output_dir)  # pyright: ignore
            logger.error(
                "%s could not be saved (%s). Training goes on; the newest checkpoint is %s.",
                name,
                error or "on another process",
                Path(newest).name if newest else "none",
            )
        return not failed

    def _make_room(self, root: Path) -> None:
        if self.args.should_save:  # pyright: ignore
            shutil.rmtree(root, ignore_errors=True)

    def _publish(self, root: Path, run_dir: Path, name: str) -> None:
        if self.args.should_save:  # pyright: ignore
            publish(root / name, run_dir / name)
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,  # pyright: ignore
                best_model_checkpoint=self.state.best_model_checkpoint,  # pyright: ignore
            )

    def _write_checkpoint(self, model: Any, trial: Any, root: Path, name: str) -> None:
        args, state = self.args, self.state  # pyright: ignore
        # pushing and deleting old checkpoints wait until this one is in its place
        kept = (args.push_to_hub, args.save_total_limit)
        self._push_requested = args.push_to_hub
        self._saving_root, args.push_to_hub, args.save_total_limit = str(root), False, None
        try:
            super()._save_checkpoint(model, trial)  # pyright: ignore
            if not args.save_only_model:
                torch.save(self.run_state(), root / name / state_file(args.process_index))  # pyright: ignore
        finally:
            args.push_to_hub, args.save_total_limit = kept
            self._saving_root = None
        best = state.best_model_checkpoint
        if best is not None and Path(best).parent == root:
            state.best_model_checkpoint = str(root.parent / Path(best).name)
            if args.should_save:
                state.save_to_json(str(root / name / "trainer_state.json"))
        if args.should_save:
            self.create_model_card(output_dir=root / name)  # pyright: ignore
        sync_tree(root / name)

    def _any_process(self, flag: bool) -> bool:
        accelerator = self.accelerator  # pyright: ignore
        if accelerator.num_processes == 1:
            return flag
        mine = torch.tensor([float(flag)], device=accelerator.device)
        return bool(accelerator.reduce(mine, reduction="sum").item() > 0)
