"""What happens around an optimizer step, as transformers callbacks that belong to the trainer."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import torch
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class StepCallback(TrainerCallback):
    """Skips updates that are not finite, times the optimizer, ends the run on SIGTERM."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.num_nonfinite = 0  # in a row
        self._start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.restore_run_state()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        norm = self.trainer.last_grad_norm
        if not math.isfinite(norm):
            # without gradients no optimizer of torch changes weights or its state
            self.trainer.model_wrapped.zero_grad(set_to_none=True)
            self.num_nonfinite += 1
            self.trainer.num_skipped_steps += 1
            logger.warning(
                "Step %d: the gradient is not finite (norm %s); the update is skipped.",
                state.global_step + 1,
                norm,
            )
            if self.num_nonfinite >= args.max_nonfinite_steps:
                raise FloatingPointError(
                    f"{self.num_nonfinite} steps in a row had a loss or gradient that is not "
                    "finite: lower learning_rate or max_grad_norm, or look at the rewards. "
                    "max_nonfinite_steps sets how many are let pass."
                )
        else:
            self.num_nonfinite = 0
        self._start = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.trainer.finish_step(time.perf_counter() - self._start)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.termination_requested():
            control.should_save = True
            control.should_training_stop = True


class SyncReference(TrainerCallback):
    """reference <- alpha policy + (1 - alpha) reference every so many steps (TR-DPO,
    2404.09656)."""

    def __init__(self, trainer: Any, reference: torch.nn.Module):
        self.trainer, self.reference = trainer, reference

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps:
            return
        alpha = args.ref_model_mixup_alpha
        policy = dict(self.trainer.model.named_parameters())
        with torch.no_grad():
            for name, parameter in self.reference.named_parameters():
                parameter.lerp_(policy[name].detach().to(parameter), alpha)
