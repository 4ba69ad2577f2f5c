"""Checkpoints that are complete or absent, whatever fails on whichever process.

Beside what transformers saves (weights, optimizer, scheduler, random states, TrainerState) a
checkpoint holds `rloo_state_<rank>.pt`: completions still to be used, metrics and losses not yet
logged; a reference model that moves; and `rloo_launch.json`, who saved it.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .checkpoint_files import (
    INCOMPLETE,
    checkpoints,
    publish,
    rotate,
    save_launch,
    state_file,
    sync_tree,
)
from .merge import record_merged
from .models import base_causal_lm, is_peft_model
from .parallel.gathering import own_class

logger = logging.getLogger(__name__)


class CheckpointMixin:
    """Trainer methods that save and resume; the trainer provides run_state()."""

    accelerator: Any
    args: Any
    buffer: Any
    model: Any
    parallel: Any
    reference: Any
    state: Any
    termination: Any

    num_failed_saves = 0
    last_saved_step: int | None
    _saving_root: str | None = None
    _push_requested = False
    _former_best: tuple[Any, Any] = (None, None)

    # Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model, as save_pretrained does; every process must call."""
        if self._saving_root is None:
            self._save_whole(output_dir)
        else:
            self._together(lambda: self._save_whole(output_dir))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)  # pyright: ignore

    def _save_whole(self, output_dir: str | None) -> None:
        state = self.parallel.whole_state(self.model)
        if state is None:
            super().save_model(output_dir, _internal_call=True)  # pyright: ignore
        elif self.args.should_save:
            with own_class(base_causal_lm(self.model)):
                self._save(output_dir, state_dict=state)  # pyright: ignore

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)  # pyright: ignore
        self._record_merged(output_dir or self.args.output_dir)

    def _record_merged(self, directory: str) -> None:
        """An adapter alone does not tell that it belongs on a sum; whole weights are that sum."""
        record_merged(directory, self.args.merge_adapter if is_peft_model(self.model) else None)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save = super()._save_optimizer_and_scheduler  # pyright: ignore

        def save_parts() -> None:
            with self.parallel.saving(output_dir):
                save(output_dir)

        self._together(save_parts)
        if self.args.sync_ref_model and self.reference is not None:
            reference = self.reference.model
            self._together(lambda: self.parallel.save_reference(reference, output_dir))

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
        try:
            self._together(action)
            return True
        except Exception as failure:  # the disk may fill in any of a dozen libraries
            error = f"{type(failure).__name__}: {failure}"
        self.num_failed_saves += 1
        found = checkpoints(Path(self.args.output_dir))
        logger.error(
            "%s could not be saved (%s). Training goes on; the newest checkpoint is %s.",
            name,
            error,
            found[-1].name if found else "none",
        )
        return False

    def _together(self, action: Callable[[], None]) -> None:
        """Run `action`; if it raises on one process, raise on all.

        For each part of a checkpoint: a process that left in between would be missing from the
        engine's collectives in the next one.
        """
        try:
            action()
        except Exception:
            self._any_process(True)
            raise
        if self._any_process(False):
            raise OSError("it failed on another process")

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
            if args.should_save:
                save_launch(root / name, self.parallel, bool(self.buffer.queue))
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
            if self.args.should_save:
                self._record_merged(self.args.output_dir)  # where super copies the adapter to
            super()._push_from_checkpoint(checkpoint_folder)  # pyright: ignore

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        self._former_best = (self.state.best_metric, self.state.best_global_step)
        return super()._determine_best_metric(*args, **kwargs)  # pyright: ignore

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
