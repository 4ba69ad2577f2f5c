"""Evaluate: eval prompts in, the loss of completions that are scored as in training out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rloo_kernels import rloo_objective
from torch import Tensor, nn

from ..data.seeds import step_seed
from ..objective.advantages import AdvantageMaker
from ..objective.settings import LossSettings
from ..records import GenerationBatch, PreparedBatch
from .prepare import Preparer

Collect = Callable[[list[dict[str, Any]], int, str], GenerationBatch]  # rows, seed, mode
Record = Callable[[PreparedBatch, int], None]  # batch, rows that are not repeats


class Evaluator:
    """Samples and scores eval prompts without gradients.

    `collect` and `record` are the trainer's, `seed` its own.
    """

    def __init__(
        self,
        collect: Collect,
        record: Record,
        preparer: Preparer,
        advantages: AdvantageMaker,
        settings: LossSettings,
        *,
        num_processes: int,
        num_generations: int,
        seed: int,
    ):
        self.collect, self.record, self.preparer = collect, record, preparer
        self.advantages, self.settings = advantages, settings
        self.num_processes, self.num_generations = num_processes, num_generations
        self.seed = seed
        self.num_batches = 0  # of the evaluation under way

    def begin(self) -> None:
        """An evaluation starts: the same seeds for the same weights."""
        self.num_batches = 0

    def __call__(self, rows: list[dict[str, Any]], wrapped: nn.Module, step: int) -> Tensor:
        """The loss of one batch of dataset rows, with ratio 1: nothing was updated.

        `step`: optimizer steps done.
        """
        k = self.num_generations
        num_real = len(rows) * k
        while len(rows) * k % self.num_processes:  # as many rows on each: repeat, do not count
            rows = [*rows, rows[-1]]
        seed = step_seed(self.seed, -1, step, self.num_batches)
        self.num_batches += 1
        batch = PreparedBatch(self.collect(rows, seed, "eval"))
        batch = self.preparer.with_reference(batch, wrapped)
        batch = self.preparer.with_old_logps(batch, wrapped)
        batch = self.advantages.known_before_update(batch)
        self.record(batch, num_real)
        return on_policy_loss(batch, self.advantages, self.settings)


def on_policy_loss(
    batch: PreparedBatch, advantages: AdvantageMaker, settings: LossSettings
) -> Tensor:
    """The loss at ratio 1, of old_logps."""
    assert batch.old_logps is not None
    generation, rows = batch.generation, list(range(batch.generation.num_rows))
    inputs = advantages.loss_inputs(batch, rows)
    return rloo_objective(
        batch.old_logps,
        generation.cu_seqlens,
        advantages=inputs.advantages,
        token_advantages=inputs.token_advantages,
        ref_logps=batch.ref_logps,
        denominator=settings.denominator(generation, rows, len(rows)),
        **settings.kernel_options(makes_advantages=False),
    ).loss
