"""Evaluation: completions of the eval prompts, scored as in training; no gradient."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from . import prompts
from .rollout.engine import step_seed


class EvaluationMixin:
    """Trainer methods; the stages are the trainer's."""

    accelerator: Any
    args: Any
    eval_dataset: Any
    is_in_train: bool
    model: Any
    parallel: Any
    policy_version: int
    scorer: Any
    state: Any
    _choose_layout: Any
    _collect: Any
    _num_generations: Any
    _record_rollout: Any
    _tokenize: Any
    saved_if_it_fails: Any

    num_eval_batches = 0  # of the evaluation under way

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]  # pyright: ignore
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluation needs an eval_dataset: pass one to the trainer.")
        rows = self.args.per_device_eval_batch_size * self.accelerator.num_processes
        return prompts.eval_loader(
            dataset,
            prompts_per_batch=max(1, rows // self._num_generations("eval")),
            num_workers=self.args.dataloader_num_workers,
        )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Samples, scores, and returns the loss, with ratio 1: nothing was updated."""
        with self.saved_if_it_fails(model) if self.is_in_train else nullcontext():
            return self._evaluate_prompts(model, inputs), None, None

    def _evaluate_prompts(self, model: nn.Module, inputs: Any) -> Tensor:
        self._choose_layout(model)
        world = self.accelerator.num_processes
        k = self._num_generations("eval")
        num_real = len(inputs) * k
        while len(inputs) * k % world:  # every process needs as many rows: repeat, do not count
            inputs = [*inputs, inputs[-1]]
        seed = step_seed(self.args.seed, -1, self.state.global_step, self.num_eval_batches)
        self.num_eval_batches += 1
        samples = self._collect(self._tokenize(inputs), seed, "eval", model)
        self.scorer.score_reference(samples, model)
        self.scorer.first_pass(samples, model)
        self._record_rollout(samples, "eval", num_real)
        return self.scorer.on_policy_loss(samples).to(self.accelerator.device)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if not self.parallel.is_set_up(self.model):
            raise ValueError(
                f"evaluate() before train() is not offered with {self.parallel.name}, which splits "
                "the model together with its optimizer: set eval_on_start=True."
            )
        self.num_eval_batches = 0
        if not self.is_in_train:
            self.policy_version += 1  # its weights may have been changed by hand
        return super().evaluate(*args, **kwargs)  # pyright: ignore
