"""What happens around an optimizer step, as transformers callbacks that belong to the trainer."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from typing import Any

import torch
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class Termination:
    """While active, SIGTERM asks for a save and a clean end instead of killing the process."""

    def __init__(self) -> None:
        self.requested = False  # this process got the signal
        self.agreed = False  # one process did, and all know
        self._previous: Any = None

    def __enter__(self) -> Termination:
        self.requested = self.agreed = False
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def _request(self, *_: Any) -> None:
        self.requested = True

    def __exit__(self, *_: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None


class StepCallback(TrainerCallback):
    """Skips updates that are not finite, times the optimizer, ends the run on SIGTERM."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._start = 0.0
        self._save_at_epoch_end = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._save_at_epoch_end = False
        self.trainer.restore_run_state()
        self.trainer.open_run_files()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        room = self.trainer.rollouts.room
        assert room is None or not room.is_made, "optimizer state is still on the host"
        norm = self.trainer.last_grad_norm
        if not math.isfinite(norm):
            self._skip_update(args, state.global_step + 1, norm)
        else:
            self.trainer.num_nonfinite_steps = 0
        self._start = time.perf_counter()

    def _skip_update(self, args: Any, step: int, norm: float) -> None:
        trainer = self.trainer
        trainer.parallel.drop_gradients(trainer.model_wrapped)
        trainer.num_skipped_steps += 1
        logger.warning(
            "Step %d: the gradient is not finite (norm %s); the update is skipped.", step, norm
        )
        scaler = trainer.accelerator.scaler
        if scaler is not None and scaler.get_scale() > 1:
            return  # fp16: the loss scale was too large, and is lowered now
        trainer.num_nonfinite_steps += 1
        if trainer.num_nonfinite_steps >= args.max_nonfinite_steps:
            raise FloatingPointError(
                f"{trainer.num_nonfinite_steps} steps in a row had a loss or gradient that is not "
                "finite: lower learning_rate or max_grad_norm, or look at the rewards. "
                "max_nonfinite_steps sets how many are let pass."
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.trainer.policy_version += 1
        self.trainer.finish_step(time.perf_counter() - self._start)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.samples_due():
            self.trainer.print_completions()
        if self.trainer.termination_requested():
            control.should_training_stop = True
        if control.should_save and (control.should_training_stop or _ends_epoch(state)):
            # a resume would not repeat what is logged and evaluated at the end of the epoch, so
            # the checkpoint waits for it
            control.should_save, self._save_at_epoch_end = False, True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stopping = self.trainer.termination_requested()  # it may have come in an evaluation
        if stopping:
            control.should_training_stop = True
            if not _ends_epoch(state) and state.global_step < state.max_steps:
                control.should_log = control.should_evaluate = False  # the epoch is to be resumed
        if stopping or self._save_at_epoch_end:
            control.should_save, self._save_at_epoch_end = True, False


def _ends_epoch(state: Any) -> bool:
    return state.epoch == int(state.epoch)


class SyncReference(TrainerCallback):
    """reference <- alpha policy + (1 - alpha) reference every so many steps (arXiv:2404.09656)."""

    def __init__(self, trainer: Any, reference: torch.nn.Module):
        self.trainer, self.reference = trainer, reference

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps:
            return
        with torch.no_grad():
            self.trainer.parallel.move_towards(
                self.reference, self.trainer.model, args.ref_model_mixup_alpha
            )
