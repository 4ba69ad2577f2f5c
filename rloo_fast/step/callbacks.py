"""What happens around an optimizer step, as transformers callbacks that belong to the trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState

from ..checkpoint.run_state import RunState
from ..checkpoint.writer import CheckpointWriter
from ..distributed import TrainingEngine
from ..reports.recorder import Recorder, table_is_due
from ..rollout.cycle import RolloutCycle
from .buffer import RolloutBuffer
from .clock import StepClock
from .nonfinite import NonfiniteSteps
from .policy_version import PolicyVersion
from .termination import Termination


class StepCallback(TrainerCallback):
    """Restores a resumed run, skips updates that are not finite, records steps, ends on SIGTERM.

    `wrapped`: the model as the training engine holds it, which is there only once train() runs.
    """

    def __init__(
        self,
        *,
        run_state: RunState,
        writer: CheckpointWriter,
        recorder: Recorder,
        clock: StepClock,
        version: PolicyVersion,
        nonfinite: NonfiniteSteps,
        termination: Termination,
        rollouts: RolloutCycle,
        buffer: RolloutBuffer,
        parallel: TrainingEngine,
        wrapped: Callable[[], nn.Module | None],
    ):
        self.run_state, self.writer, self.recorder = run_state, writer, recorder
        self.clock, self.version, self.nonfinite = clock, version, nonfinite
        self.termination, self.rollouts, self.buffer = termination, rollouts, buffer
        self.parallel, self.wrapped = parallel, wrapped
        self._save_at_epoch_end = False

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._save_at_epoch_end = False
        if self.run_state.restore():
            self.writer.last_saved_step = state.global_step
        self.recorder.open_run_files(state.global_step, state.max_steps)
        # a resumed state has the checkpoint's logging_steps, eval_steps, save_steps
        state.compute_steps(args, state.max_steps)

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        room = self.rollouts.room
        assert room is None or not room.is_made, "optimizer state is still on the host"
        if self.nonfinite.must_skip():
            wrapped = self.wrapped()
            assert wrapped is not None
            self.parallel.drop_gradients(wrapped)
            self.nonfinite.skip(state.global_step + 1, self.parallel.accelerator.scaler)
        self.clock.begin_optimizer()

    def on_optimizer_step(
        self, args: Any, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        self.version.advance()
        self.clock.end_step()
        episodes = self.buffer.num_added * args.generation_batch_size
        self.recorder.record_step(self.clock.stages, self.clock.step_s, self.clock.run_s, episodes)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if table_is_due(state.global_step, state.max_steps, args.num_sample_generations or 0):
            self.recorder.print_completions(state.global_step)
        if self.termination.agree():
            control.should_training_stop = True
        if control.should_save and (control.should_training_stop or _ends_epoch(state)):
            # a resume would not repeat what is logged and evaluated at the end of the epoch, so
            # the checkpoint waits for it
            control.should_save, self._save_at_epoch_end = False, True

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        stopping = self.termination.agree()  # it may have come in an evaluation
        if stopping:
            control.should_training_stop = True
            if not _ends_epoch(state) and state.global_step < state.max_steps:
                control.should_log = control.should_evaluate = False  # the epoch is to be resumed
        if stopping or self._save_at_epoch_end:
            control.should_save, self._save_at_epoch_end = True, False


def _ends_epoch(state: TrainerState) -> bool:
    assert state.epoch is not None
    return state.epoch == int(state.epoch)


class SyncReference(TrainerCallback):
    """reference <- alpha policy + (1 - alpha) reference every so many steps (arXiv:2404.09656)."""

    def __init__(self, parallel: TrainingEngine, policy: nn.Module, reference: nn.Module):
        self.parallel, self.policy, self.reference = parallel, policy, reference

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps:
            return
        with torch.no_grad():
            self.parallel.move_towards(self.reference, self.policy, args.ref_model_mixup_alpha)
