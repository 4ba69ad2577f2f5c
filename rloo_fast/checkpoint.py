"""Checkpoints that are complete or absent, and resumes that repeat the uninterrupted run.

A checkpoint is written under `<output_dir>/.incomplete/` and renamed to `checkpoint-N` when every
file of every process is on the disk; an old one is renamed into `.incomplete/` before it is
deleted. Beside what transformers saves (weights, optimizer, scheduler, random states, TrainerState)
it holds `rloo_state_<rank>.pt`: completions still to be used, metrics and losses not yet logged, a
reference model that moves. Several machines need a shared output_dir.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .models import REF_ADAPTER

logger = logging.getLogger(__name__)

INCOMPLETE = ".incomplete"
REPLACED = "replaced-"


def state_file(rank: int | str) -> str:
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
    resume: str | bool | None, output_dir: str, num_processes: int | None = None
) -> str | None:
    """The checkpoint to resume from: a directory as given, or with True the newest of output_dir.

    Raises ValueError where there is none, or it cannot be resumed from (by `num_processes`).
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
    if path.resolve().parent.name == INCOMPLETE or not (path / "trainer_state.json").is_file():
        raise ValueError(
            f"resume_from_checkpoint={str(path)!r} is not a complete checkpoint: give a directory "
            "checkpoint-N with a trainer_state.json in it."
        )
    if not (path / state_file(0)).is_file():
        raise ValueError(
            f"{str(path)!r} holds no {state_file(0)}: it was saved by another trainer or with "
            "save_only_model=True, and cannot be resumed from. Load its weights as the model."
        )
    num_saved = len(list(path.glob(state_file("*"))))
    if num_processes not in (None, num_saved):
        raise ValueError(
            f"{str(path)!r} was saved by {num_saved} processes and cannot be resumed by "
            f"{num_processes}: launch as many."
        )
    return str(path)


def put_back(run_dir: Path) -> None:
    """Undo a replacement (see `publish`) that was cut between its two renames."""
    for old in (run_dir / INCOMPLETE).glob(f"{REPLACED}checkpoint-*"):
        final = run_dir / old.name.removeprefix(REPLACED)
        if not final.exists():
            with suppress(OSError):  # another process was faster
                os.rename(old, final)


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


def rotate(run_dir: Path, limit: int | None, newest: Path, best: str | None) -> None:
    """Keep `limit` checkpoints: `newest`, the best one, and what was saved last before.

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
        (run_dir / INCOMPLETE).mkdir(exist_ok=True)
        os.rename(path, run_dir / INCOMPLETE / f"deleted-{path.name}")


class CheckpointMixin:
    """Trainer methods that save and resume; the trainer provides run_state()."""

    accelerator: Any
    args: Any
    control: Any
    model: Any
    state: Any
    termination: Any

    num_failed_saves = 0
    last_saved_step: int | None
    _saving_root: str | None = None
    _push_requested = False
    _former_best: tuple[Any, Any] = (None, None)

    # Saving

    def _get_output_dir(self, trial: Any) -> str:
        return self._saving_root or super()._get_output_dir(trial)  # pyright: ignore

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write beside, then rename. A failure is reported; training and old checkpoints go on."""
        state, run_dir = self.state, Path(super()._get_output_dir(trial))  # pyright: ignore
        root, name = run_dir / INCOMPLETE, f"checkpoint-{state.global_step}"
        best = state.best_model_checkpoint
        self._push_requested = False
        if not (
            self._all_succeed(name, lambda: self._make_room(root))
            and self._all_succeed(name, lambda: self._write_checkpoint(model, trial, root, name))
            and self._all_succeed(name, lambda: self._publish(root, run_dir, name))
        ):
            self._make_room(root)
            state.best_model_checkpoint = best
            if state.best_global_step == state.global_step:
                state.best_metric, state.best_global_step = self._former_best
            return
        self.last_saved_step = state.global_step
        if self._push_requested:
            self._push_from_checkpoint(str(run_dir / name))

    def _all_succeed(self, name: str, action: Callable[[], None]) -> bool:
        """Run `action`; True if it raised on no process. A failure is logged, not raised."""
        error = ""  # not the exception: it would keep the file open that fills the disk
        try:
            action()
        except Exception as failure:  # the disk may fill in any of a dozen libraries
            error = f"{type(failure).__name__}: {failure}"
        failed = self._any_process(bool(error))
        if failed:
            self.num_failed_saves += 1
            found = checkpoints(Path(self.args.output_dir))
            logger.error(
                "%s could not be saved (%s). Training goes on; the newest checkpoint is %s.",
                name,
                error or "on another process",
                found[-1].name if found else "none",
            )
        return not failed

    def _make_room(self, root: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(root, ignore_errors=True)

    def _write_checkpoint(self, model: Any, trial: Any, root: Path, name: str) -> None:
        args, state = self.args, self.state
        # without a best step, super looks for its checkpoint neither in root nor behind a barrier,
        # where the other processes would wait for one whose disk is full
        best_step, state.best_global_step = state.best_global_step, None
        self._saving_root = str(root)
        try:
            super()._save_checkpoint(model, trial)  # pyright: ignore
        finally:
            self._saving_root, state.best_global_step = None, best_step
        if not args.save_only_model:
            torch.save(self.run_state(), root / name / state_file(args.process_index))  # pyright: ignore
        if best_step:
            best = root.parent / f"checkpoint-{best_step}"
            if best_step == state.global_step or best.is_dir():
                state.best_model_checkpoint = str(best)
        if args.should_save:
            state.save_to_json(str(root / name / "trainer_state.json"))
            self.create_model_card(output_dir=root / name)  # pyright: ignore

    def _publish(self, root: Path, run_dir: Path, name: str) -> None:
        if self.args.should_save:
            sync_tree(root / name)
            publish(root / name, run_dir / name)
            best = self.state.best_model_checkpoint
            rotate(run_dir, self.args.save_total_limit, run_dir / name, best)
            self._make_room(root)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._saving_root is not None:  # not before the checkpoint is in its place
            self._push_requested = True
        else:
            super()._push_from_checkpoint(checkpoint_folder)  # pyright: ignore

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        self._former_best = (self.state.best_metric, self.state.best_global_step)
        return super()._determine_best_metric(*args, **kwargs)  # pyright: ignore

    # Resuming, where transformers' run would differ from the uninterrupted one

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # pyright: ignore
        # transformers 5.16 leaves out the trained adapter where the reference's lies beside it
        if REF_ADAPTER in getattr(self.model, "peft_config", {}):
            self.model.load_adapter(resume_from_checkpoint, "default", is_trainable=True)

    def _evaluate(
        self, *args: Any, skip_scheduler: bool = False, **kwargs: Any
    ) -> dict[str, float]:
        if skip_scheduler and self.state.global_step > 0:
            return {}  # eval_on_start: the run has started before
        return super()._evaluate(*args, skip_scheduler=skip_scheduler, **kwargs)  # pyright: ignore

    def _run_epoch(self, *, epoch: int, train_dataloader: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # resumed from the last step: none is left
            return
        # in a resumed epoch, transformers 5.16 sets the epoch of a loader that skips the steps done
        # and does not pass it on
        if hasattr(train_dataloader, "set_epoch"):
            train_dataloader.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **kwargs)  # pyright: ignore

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # with a limit of 1, transformers would delete the newest checkpoint unless it is the best
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)  # pyright: ignore
        finally:
            self.args.save_total_limit = limit

    # SIGTERM

    def termination_requested(self) -> bool:
        """Whether SIGTERM reached one of the processes; every process must ask."""
        agreed = self.termination.agreed or self._any_process(self.termination.requested)
        self.termination.agreed = agreed
        return agreed

    def exit_if_terminated(self) -> None:
        """At the end of train(): exit 0 if SIGTERM came and its checkpoint is there, 1 if not."""
        stopped, step = self.termination.agreed, self.state.global_step
        if not self.termination_requested():
            return
        if self.last_saved_step == step:
            logger.warning("SIGTERM: saved after step %d, exiting.", step)
            sys.exit(0)
        if stopped:
            logger.error("SIGTERM: exiting; the checkpoint of step %d could not be saved.", step)
            sys.exit(1)
        logger.warning("SIGTERM came after the last step; train() returns as usual.")

    def _any_process(self, flag: bool) -> bool:
        accelerator = self.accelerator
        if accelerator.num_processes == 1:
            return flag
        mine = torch.tensor([float(flag)], device=accelerator.device)
        return bool(accelerator.reduce(mine, reduction="sum").item() > 0)
