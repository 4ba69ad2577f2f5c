"""Checkpoints that are complete or absent, whatever fails on whichever process.

Beside what transformers saves (weights, optimizer, scheduler, random states, TrainerState) a
checkpoint holds `rloo_state_<rank>.pt`: completions still to be used, metrics and losses not yet
logged; a reference model that moves, or the start weights of a policy with adapters; and
`rloo_launch.json`, who saved it.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState

from ..config.rloo_config import RLOOConfig
from ..distributed import TrainingEngine
from ..distributed.collectives import gather_objects
from ..distributed.gathering import own_class
from ..models.adapters import base_causal_lm, is_peft_model, saved_names
from ..models.merge import record_merged
from .files import (
    INCOMPLETE,
    check_present,
    checkpoints,
    clear,
    publish,
    rotate,
    save_launch,
    state_file,
    sync_tree,
)
from .manifest import write_manifest
from .optimizer_settings import optimizer_settings
from .run_state import RunState
from .together import run_together
from .weights import save_start_weights

logger = logging.getLogger(__name__)

Save = Callable[[], None]  # transformers' own way of saving something, arguments bound


class CheckpointWriter:
    """Writes a checkpoint beside its place and renames it; transformers' own saving is passed in.

    moving_reference: the reference model, where it follows the policy; None: it stays as it is.
    merged_adapter: what was merged into the model before new adapters were added. should_save:
    whether this process writes what is written once. limit: how many checkpoints are kept, None:
    all. completions_wait: whether sampled completions are still to be used. write_card: the model
    card of a directory.
    """

    def __init__(
        self,
        model: nn.Module,
        moving_reference: nn.Module | None,
        parallel: TrainingEngine,
        run_state: RunState,
        *,
        output_dir: str,
        process_index: int,
        should_save: bool,
        save_only_model: bool,
        limit: int | None,
        merged_adapter: str | None,
        optimizer_settings: Callable[[], dict[str, Any]],
        completions_wait: Callable[[], bool],
        write_card: Callable[[Path], None],
    ):
        self.model, self.moving_reference = model, moving_reference
        self.parallel, self.accelerator = parallel, parallel.accelerator
        self.run_state, self.output_dir = run_state, output_dir
        self.process_index, self.should_save = process_index, should_save
        self.save_only_model, self.limit = save_only_model, limit
        self.merged_adapter, self.optimizer_settings = merged_adapter, optimizer_settings
        self.completions_wait, self.write_card = completions_wait, write_card
        self.num_failed = 0
        self.last_saved_step: int | None = None
        self.failed_step: int | None = None  # of a save that no later one has made up for
        self.root: str | None = None  # what a checkpoint is written under, while it is
        self._failed_write: Save | None = None
        self._run = ""  # drawn at the first save
        self._push_requested = False
        self._former_best: tuple[float | None, int | None] = (None, None)

    @classmethod
    def from_config(
        cls,
        args: RLOOConfig,
        model: nn.Module,
        moving_reference: nn.Module | None,
        parallel: TrainingEngine,
        run_state: RunState,
        *,
        completions_wait: Callable[[], bool],
        write_card: Callable[[Path], None],
    ) -> CheckpointWriter:
        return cls(
            model,
            moving_reference,
            parallel,
            run_state,
            output_dir=str(args.output_dir),
            process_index=args.process_index,
            should_save=args.should_save,
            save_only_model=args.save_only_model,
            limit=args.save_total_limit,
            merged_adapter=args.merge_adapter,
            optimizer_settings=partial(optimizer_settings, args),
            completions_wait=completions_wait,
            write_card=write_card,
        )

    # The model

    def save_model(self, save: Save, save_state: Callable[[dict[str, Tensor]], None]) -> None:
        """Write the whole model, as save_pretrained does; every process must call.

        `save`: transformers' way; `save_state`: its way with weights that the engine gathered.
        """

        def save_whole() -> None:
            state = self.parallel.whole_state(self.model, saved_names(self.model))
            if state is None:
                save()
            elif self.should_save:
                with own_class(base_causal_lm(self.model)):
                    save_state(state)

        if self.root is None:
            save_whole()
        else:
            run_together(self.accelerator, save_whole)

    def record_merged(self, directory: str | None = None) -> None:
        """An adapter alone does not tell that it belongs on a sum; whole weights are that sum."""
        directory = directory or self.output_dir
        record_merged(directory, self.merged_adapter if is_peft_model(self.model) else None)

    # A checkpoint

    def save(self, state: TrainerState, run_dir: Path, write: Save) -> Path | None:
        """The checkpoint of the steps done; `write`: transformers' part of it, below `self.root`.

        A failure is reported; training and old checkpoints go on. Returns the directory where it
        is to be pushed to the Hub.
        """
        name = f"checkpoint-{state.global_step}"
        self._push_requested = False
        if error := self._save_below(run_dir, name, state, write):
            self.num_failed += 1
            found = checkpoints(Path(self.output_dir))
            logger.error(
                "%s could not be saved (%s). Training goes on; the newest checkpoint is %s.",
                name, error, found[-1].name if found else "none",
            )  # fmt: skip
            self.failed_step, self._failed_write = state.global_step, write
            return None
        self.last_saved_step, self.failed_step = state.global_step, None
        self._failed_write = None
        self._delete_old(run_dir, name, state)
        return run_dir / name if self._push_requested else None

    def save_at_the_end(self, state: TrainerState, save: Save) -> Path | None:
        """Of a run that ends now, and that no later checkpoint makes up for: `save` it, and if that
        fails, elsewhere (returned)."""
        save()
        if self.failed_step != state.global_step:
            return None
        assert self._failed_write is not None
        return self._save_elsewhere(state, self._failed_write)

    def _save_elsewhere(self, state: TrainerState, write: Save) -> Path | None:
        """Below the directory for temporary files. None, and said, if that fails as well."""
        name, folder = f"checkpoint-{state.global_step}", ""
        if self.should_save:
            with suppress(OSError):
                folder = tempfile.mkdtemp(prefix="rloo_fast-saved-")
        folder = next(filter(None, gather_objects(self.accelerator, folder)), "")
        error = "there is no directory for temporary files"
        if folder:
            error = self._save_below(Path(folder), name, state, write)
        if not error:
            logger.error(
                "%s is in %s, not in %s: move it there before temporary files are deleted, and "
                "resume from it.", name, folder, self.output_dir,
            )  # fmt: skip
            return Path(folder) / name
        if folder and self.should_save:
            shutil.rmtree(folder, ignore_errors=True)
        logger.error(
            "%s could not be saved in %s either (%s): what was trained since checkpoint-%d is in "
            "no checkpoint.",
            name, folder or tempfile.gettempdir(), error, self.last_saved_step or 0,
        )  # fmt: skip
        return None

    def _save_below(self, run_dir: Path, name: str, state: TrainerState, write: Save) -> str | None:
        """Write and publish a checkpoint; what failed, on any process, or None."""
        root, best = self._scratch(run_dir), state.best_model_checkpoint
        for part in (
            lambda: self._clear(root),
            lambda: self._write(state, root, name, write),
            lambda: self._complete(state, root / name),
            lambda: self._publish(root / name, run_dir / name),
        ):
            try:
                run_together(self.accelerator, part)
            except Exception as failure:  # the disk may fill in any of a dozen libraries
                error = f"{type(failure).__name__}: {failure}"
                break
        else:
            error = None
        self._clear(root)
        if error is None:
            return None
        state.best_model_checkpoint = best
        if state.best_global_step == state.global_step:
            state.best_metric, state.best_global_step = self._former_best
        return error

    def _scratch(self, run_dir: Path) -> Path:
        """What checkpoints are written under: of this run alone, the same on all processes."""
        if not self._run:
            self._run = gather_objects(self.accelerator, secrets.token_hex(4))[0]
        return run_dir / INCOMPLETE / self._run

    def _clear(self, root: Path) -> None:
        if self.should_save:
            clear(root)

    def _write(self, state: TrainerState, root: Path, name: str, write: Save) -> None:
        # without a best step, transformers looks for its checkpoint neither in root nor behind a
        # barrier, where the other processes would wait for one whose disk is full
        best_step, state.best_global_step = state.best_global_step, None
        self.root = str(root)
        try:
            write()
        finally:
            self.root, state.best_global_step = None, best_step
        if not self.save_only_model:
            torch.save(self.run_state.state_dict(), root / name / state_file(self.process_index))
            if self.should_save:
                save_launch(
                    root / name, self.parallel, self.completions_wait(), self.optimizer_settings()
                )
        if best_step:
            best = root.parents[1] / f"checkpoint-{best_step}"
            if best_step == state.global_step or best.is_dir():
                state.best_model_checkpoint = str(best)
        if self.should_save:
            state.save_to_json(str(root / name / "trainer_state.json"))
            self.write_card(root / name)

    def _complete(self, state: TrainerState, checkpoint: Path) -> None:
        """Every file is there, or OSError; the manifest is the last."""
        if not self.save_only_model:
            check_present(checkpoint, self.accelerator.num_processes)
            write_manifest(checkpoint, state.global_step, self.accelerator, self.should_save)

    def _publish(self, written: Path, final: Path) -> None:
        if self.should_save:
            sync_tree(written)
            publish(written, final)

    def _delete_old(self, run_dir: Path, name: str, state: TrainerState) -> None:
        """Once the new one is in its place; what cannot be deleted is said, and stays."""
        scratch = self._scratch(run_dir)
        if self.should_save:
            try:
                best = state.best_model_checkpoint
                rotate(run_dir, scratch, self.limit, run_dir / name, best)
            except OSError as error:
                logger.error("Old checkpoints could not be deleted (%s).", error)
        self._clear(scratch)

    def save_optimizer(self, directory: str, save: Save) -> None:
        """The engine's part of a checkpoint, and a reference that moves, or of adapters."""

        def save_parts() -> None:
            with self.parallel.saving(directory):
                save()

        def save_start() -> None:
            save_start_weights(self.model, directory, is_main_process=self.should_save)

        run_together(self.accelerator, save_parts)
        run_together(self.accelerator, save_start)
        reference = self.moving_reference
        if reference is not None:
            run_together(
                self.accelerator, lambda: self.parallel.save_reference(reference, directory)
            )

    def push(self, push: Save) -> None:
        """Upload a checkpoint once it is in its place; before that, only note the wish."""
        if self.root is not None:
            self._push_requested = True
            return
        try:
            if self.should_save:
                self.record_merged()  # where transformers copies the adapter to
            push()
        except Exception as error:  # of the network, the Hub, or files that are copied
            logger.error(
                "A checkpoint could not be pushed to the Hub (%s: %s). Training goes on, and all "
                "is in %s.", type(error).__name__, error, self.output_dir,
            )  # fmt: skip

    def keep_former_best(self, state: TrainerState) -> None:
        """Before a new best metric is noted, whose checkpoint may fail to be saved."""
        self._former_best = (state.best_metric, state.best_global_step)
