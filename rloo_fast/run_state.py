"""What, beside transformers' own state, the next step depends on: saved, and restored."""

from __future__ import annotations

from typing import Any

from .checkpoint import load_state


class RunStateMixin:
    """Trainer methods; the state goes into every checkpoint, one file per process."""

    args: Any
    buffer: Any
    metrics: Any
    planner: Any
    reference: Any
    state: Any
    _tr_loss: Any
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
