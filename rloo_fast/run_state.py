"""Resumes that repeat the uninterrupted run: what, beside transformers' own state, the next step
depends on, and where transformers' resumed run would differ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .checkpoint_files import load_launch, load_state
from .checkpoint_weights import check_trained, load_weights, trained_shapes
from .truth import SamplerMismatch


class RunStateMixin:
    """Trainer methods; the state goes into every checkpoint, one file per process."""

    accelerator: Any
    args: Any
    buffer: Any
    collector: Any
    control: Any
    metrics: Any
    model: Any
    parallel: Any
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
        return {
            "buffer": self.buffer.state_dict(),
            "metrics": self.metrics.state_dict(),
            "tr_loss": float(self._tr_loss),
            "last_logged": self._globalstep_last_logged,
            "loss_total": self.loss_total,
            "num_skipped_steps": self.num_skipped_steps,
            "num_nonfinite_steps": self.num_nonfinite_steps,
            "planner": self.planner.state_dict(),
            "trained": trained_shapes(self.model),
        }

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
                self.parallel.drop_gradients(model)
                self._save_checkpoint(model, None)
            if step and self.last_saved_step == step:
                error.add_note(
                    f"checkpoint-{step} holds the {step} steps done: resume_from_checkpoint=True."
                )
            raise

    def restore_run_state(self) -> None:
        if self._resume_from is None:
            return
        state = self._saved_state(self._resume_from)
        check_trained(self.model, state["trained"], self._resume_from)
        if self.args.sync_ref_model and self.reference is not None:
            self.parallel.load_reference(self.reference.model, self._resume_from)
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

    def _saved_state(self, checkpoint: str) -> dict[str, Any]:
        """This process' run_state(); of as many processes as saved it, or of another number."""
        num_saved = load_launch(Path(checkpoint))["num_processes"]
        if num_saved == self.accelerator.num_processes:
            return load_state(checkpoint, self.args.process_index)
        states = [load_state(checkpoint, rank) for rank in range(num_saved)]
        # of the rest, all processes have the same
        return states[0] | {"tr_loss": sum(state["tr_loss"] for state in states) / num_saved}

    # Where transformers' resumed run would differ from the uninterrupted one

    # it loads the files' names, which may be others than the model's, and only logs what has no
    # place there
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.parallel.loads_checkpoints:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # pyright: ignore
        else:
            load_weights(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.parallel.loads_checkpoints:
            super()._load_best_model()  # pyright: ignore
        else:
            load_weights(self.model, self.state.best_model_checkpoint)

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
