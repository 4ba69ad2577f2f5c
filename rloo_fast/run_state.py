"""What, beside transformers' own state, the next step depends on: saved, and restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .checkpoint import load_state
from .truth import SamplerMismatch


class RunStateMixin:
    """Trainer methods; the state goes into every checkpoint, one file per process."""

    args: Any
    buffer: Any
    collector: Any
    metrics: Any
    planner: Any
    reference: Any
    rollouts: Any
    state: Any
    _tr_loss: Any
    _save_checkpoint: Any
    _load_rng_state: Any

    loss_total = 0.0  # of every step so far, for the mean that is logged at the end
    num_skipped_steps = 0  # whose gradient was not finite
    num_nonfinite_steps = 0  # of those, the latest ones in a row
    last_saved_step: int | None = None
    _globalstep_last_logged = 0
    _resume_from: str | None = None

    def run_state(self) -> dict[str, Any]:
        """What, beside transformers' own state, the next step depends on."""
        state = {
            "buffer": self.buffer.state_dict(),
            "metrics": self.metrics.state_dict(),
            "tr_loss": float(self._tr_loss),
            "last_logged": self._globalstep_last_logged,
            "loss_total": self.loss_total,
            "num_skipped_steps": self.num_skipped_steps,
            "num_nonfinite_steps": self.num_nonfinite_steps,
            "planner": self.planner.state_dict(),
        }
        if self.args.sync_ref_model and self.reference is not None:
            state["reference"] = self.reference.model.state_dict()
        return state

    @contextmanager
    def saved_if_it_fails(self, model: Any) -> Iterator[None]:
        """Around a training step: what rollouts and rewards raise ends the run, but first the state
        before the step is saved, unless it has been. Saving takes all processes, so it is done only
        for what all of them raise together."""
        before = self.buffer.state_dict(), self.metrics.state_dict()
        try:
            yield
        except Exception as error:
            if not (self.collector.failed or isinstance(error, SamplerMismatch)):
                raise
            self.rollouts.close()
            step = self.state.global_step
            if step not in (0, self.last_saved_step):
                self.buffer.load_state_dict(before[0])
                self.metrics.load_state_dict(before[1])
                model.zero_grad(set_to_none=True)
                self._save_checkpoint(model, None)
            if step and self.last_saved_step == step:
                error.add_note(
                    f"checkpoint-{step} holds the {step} steps done: resume_from_checkpoint=True."
                )
            raise

    def restore_run_state(self) -> None:
        if self._resume_from is None:
            return
        state = load_state(self._resume_from, self.args.process_index)
        self._load_rng_state(self._resume_from)  # transformers waits until a step is taken
        self._resume_from = None
        self.last_saved_step = self.state.global_step
        self.buffer.load_state_dict(state["buffer"])
        self.metrics.load_state_dict(state["metrics"])
        self._tr_loss += state["tr_loss"]
        self._globalstep_last_logged = state["last_logged"]
        self.loss_total = state["loss_total"]
        self.num_skipped_steps = state["num_skipped_steps"]
        self.num_nonfinite_steps = state["num_nonfinite_steps"]
        self.planner.load_state_dict(state["planner"])
        if "reference" in state and self.reference is not None:
            self.reference.model.load_state_dict(state["reference"])
