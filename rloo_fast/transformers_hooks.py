"""Every method of transformers.Trainer that is overridden though it is private, or only to fit.

One place to audit when transformers is upgraded; tests/test_transformers_hooks.py compares names
and parameters with the installed version.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import Tensor, nn
from transformers import Trainer

from .checkpoint.files import reading
from .checkpoint.run_state import RunState
from .checkpoint.writer import CheckpointWriter
from .config.rloo_config import RLOOConfig
from .distributed import TrainingEngine
from .distributed.pickles import only_data
from .masking import masked
from .step.nonfinite import NonfiniteSteps

logger = logging.getLogger(__name__)


class TransformersHooks(Trainer):
    """transformers' Trainer with our checkpoints, engines and step; read against 5.16 to 5.19.

    _build_accelerator_args: the backbone is compiled, in the update only, not the whole model.
    init_hf_repo: why the repository of push_to_hub cannot be made is said.
    _set_signature_columns_if_needed: rows keep the columns that reward functions need.
    get_total_train_batch_size: one step of the Trainer is a whole effective batch.
    create_scheduler: called once between the engine's set-up and the first use of the optimizer.
    _get_grad_norm: engines that split gradients have norms of their own; kept for NonfiniteSteps.
    _run_epoch: a run resumed from its last step takes none; a resumed epoch shuffles as before.
    _evaluate: eval_on_start holds at the start of a run, not of a resumed one.
    _finalize_training: with a limit of 1, the newest checkpoint would be deleted unless the best;
        a last save that failed is tried again.
    _get_output_dir, _save_checkpoint, _save_optimizer_and_scheduler: checkpoints are written under
        another directory and renamed when they are complete; see CheckpointWriter.
    save_model, _save: split weights are gathered; the adapter merged before is recorded.
    _push_from_checkpoint: not before the checkpoint is in its place; a failure is said.
    _finish_current_push: a failure is said.
    _determine_best_metric: the former best comes back if the new one cannot be saved.
    _load_from_checkpoint, _load_best_model: weights go to the parameters they were saved from.
    _load_optimizer_and_scheduler: FSDP2's files are unpickled, as data only.
    """

    args: RLOOConfig
    model: nn.Module
    parallel: TrainingEngine
    run_state: RunState
    checkpoints: CheckpointWriter
    nonfinite: NonfiniteSteps

    # Setting up

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        plugin = TorchDynamoPlugin(backend=DynamoBackend.NO)
        return super()._build_accelerator_args(**kwargs) | {"dynamo_plugin": plugin}

    def init_hf_repo(self, token: str | None = None) -> None:
        try:
            super().init_hf_repo(token)
        except Exception as error:  # of the network or the Hub
            name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
            raise ValueError(
                f"push_to_hub: the repository {name!r} cannot be reached or created on the Hub "
                f"({type(error).__name__}: {masked(str(error))}). Check the network, hub_model_id "
                "and hub_token, or leave push_to_hub out and upload the directory later."
            ) from error

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt"]

    def get_total_train_batch_size(self, args: Any) -> int:
        # transformers counts gradient_accumulation_steps, which is 1 in its loop
        in_a_step = self.args.micro_steps_per_update // self.args.gradient_accumulation_steps
        return super().get_total_train_batch_size(args) * in_a_step

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        self.parallel.adopt_optimizer(self.optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    # The loop

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = self.parallel.grad_norm()
        if norm is None:
            norm = super()._get_grad_norm(model, grad_norm)
        assert norm is not None
        self.nonfinite.grad_norm = float(norm)
        return norm

    def _run_epoch(
        self,
        model: nn.Module,
        epoch: int,
        train_dataloader: Any,
        steps_in_epoch: int,
        num_update_steps_per_epoch: int,
        trial: Any,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        resume_from_checkpoint: str | None,
        epochs_trained: int,
        steps_trained_in_current_epoch: int,
    ) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # resumed from the last step: none is left
            return
        # in a resumed epoch, transformers 5.16 sets the epoch of a loader that skips the steps done
        # and does not pass it on
        if hasattr(train_dataloader, "set_epoch"):
            train_dataloader.set_epoch(epoch)
        super()._run_epoch(
            model=model,
            epoch=epoch,
            train_dataloader=train_dataloader,
            steps_in_epoch=steps_in_epoch,
            num_update_steps_per_epoch=num_update_steps_per_epoch,
            trial=trial,
            ignore_keys_for_eval=ignore_keys_for_eval,
            start_time=start_time,
            resume_from_checkpoint=resume_from_checkpoint,
            epochs_trained=epochs_trained,
            steps_trained_in_current_epoch=steps_trained_in_current_epoch,
        )

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        if skip_scheduler and self.state.global_step > 0:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        if self.checkpoints.failed_step == self.state.global_step:  # before the best is loaded
            wrapped: Any = self.model_wrapped
            save = partial(self._save_checkpoint, wrapped, trial)
            self.checkpoints.save_at_the_end(self.state, save)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit

    # Saving

    def _get_output_dir(self, trial: Any) -> str:
        return self.checkpoints.root or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir, write = Path(super()._get_output_dir(trial)), super()._save_checkpoint
        pushed = self.checkpoints.save(self.state, run_dir, partial(write, model, trial))
        if pushed is not None:
            self._push_from_checkpoint(str(pushed))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save = super()._save_optimizer_and_scheduler
        self.checkpoints.save_optimizer(output_dir, partial(save, output_dir))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model, as save_pretrained does; every process must call."""
        save = partial(super().save_model, output_dir, _internal_call=True)
        self.checkpoints.save_model(save, partial(self._save, output_dir))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        super()._save(output_dir, state_dict)
        self.checkpoints.record_merged(output_dir)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self.checkpoints.push(partial(super()._push_from_checkpoint, checkpoint_folder))

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        jobs = getattr(getattr(self, "push_in_progress", None), "jobs", ())
        for error in filter(None, [job.exception() for job in jobs]):
            logger.error(
                "A checkpoint could not be pushed to the Hub (%s: %s). All is in %s.",
                type(error).__name__, error, self.args.output_dir,
            )  # fmt: skip

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        self.checkpoints.keep_former_best(self.state)
        return super()._determine_best_metric(metrics, trial)

    # Loading

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load = partial(super()._load_from_checkpoint, resume_from_checkpoint, model)
        self.run_state.load_weights(resume_from_checkpoint, load)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with only_data(), reading(checkpoint, "the state of optimizer or scheduler"):
                super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        self.run_state.load_weights(best, super()._load_best_model)


class LossSinceLog:
    """The part of transformers' running loss that has not been logged, for RunState."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "tr_loss": float(trainer._tr_loss),
            "last_logged": trainer._globalstep_last_logged,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainer._tr_loss += state["tr_loss"]
        self.trainer._globalstep_last_logged = state["last_logged"]
