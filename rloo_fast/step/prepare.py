"""Prepare: a generation batch in, what must be known before its update out.

    GenerationBatch -> [reference log-probs] -> [old log-probs] -> advantages -> PreparedBatch

On-policy, with whole groups in a micro-batch, only the reference runs: the update's own forward
gives the rest (`update.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator
from rloo_kernels.loss.packed import segment_sum
from rloo_kernels.transfer import to_host
from torch import Tensor, nn

from ..batching.planner import Planner
from ..batching.retry import MicroBatchRunner, equal_numbers
from ..distributed import TrainingEngine
from ..distributed.collectives import any_process
from ..models.reference import reference_weights, start_weights
from ..objective.advantages import AdvantageMaker
from ..objective.settings import LossSettings
from ..policy.forward import Policy
from ..records import GenerationBatch, MicroBatchPlan, PreparedBatch


class Preparer:
    """Passes without gradients over generation batches, and their advantages.

    `reference`: the frozen model; None: the policy with its start weights in place.
    `reference_head_fp8`: its lm_head is multiplied in fp8, the policy's never.
    `stage(name)`: a context that times what runs in it. `say`: tells the user a sentence once.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        planner: Planner,
        runner: MicroBatchRunner,
        advantages: AdvantageMaker,
        settings: LossSettings,
        parallel: TrainingEngine,
        *,
        rows_per_pass: int | None,
        has_dropout: bool,
        reference_head_fp8: bool,
        stage: Callable[[str], AbstractContextManager[None]],
        say: Callable[[str], None],
    ):
        self.policy, self.reference, self.planner = policy, reference, planner
        self.runner, self.advantages, self.settings = runner, advantages, settings
        self.parallel, self.rows_per_pass, self.has_dropout = parallel, rows_per_pass, has_dropout
        self.reference_head_fp8 = reference_head_fp8
        self.stage, self.say = stage, say
        self.accelerator: Accelerator = parallel.accelerator

    def __call__(
        self, batch: GenerationBatch, wrapped: nn.Module, *, covered_by_first_update: bool
    ) -> PreparedBatch:
        """`covered_by_first_update`: one optimizer step takes all of its rows, at once."""
        self._check_stale(batch)
        prepared = PreparedBatch(batch)
        with self.stage("reference"):
            prepared = self.with_reference(prepared, wrapped)
        reason = self.first_pass_reason(batch, covered_by_first_update)
        if reason is not None:
            self.say(f"A policy pass without gradients runs before the update: {reason}.")
            with self.stage("old_logps"):
                prepared = self.with_old_logps(prepared, wrapped)
        return self.advantages.known_before_update(prepared)

    def _check_stale(self, batch: GenerationBatch) -> None:
        """Raises ValueError for rows of older weights whose log-probs nobody knows."""
        if batch.sampler_logps is not None:
            return
        if any_process(self.accelerator, bool(batch.stale_rows.any())):
            raise ValueError(
                "completions of older weights are trained on by the ratio to the log-probs that "
                "they were sampled with, and the rollout engine gave none: sample with the "
                "policy's own weights, or by an engine with log-probs (Rollout.logps)."
            )

    def again_without_memory(self, batch: PreparedBatch, wrapped: nn.Module) -> PreparedBatch:
        """The batch after the budget was halved: its groups may no longer fit a micro-batch, so
        that advantages cannot come out of the forward."""
        if batch.advantages is not None or not self.planner.why_groups_are_split(batch.generation):
            return batch
        return self.advantages.known_before_update(self.with_old_logps(batch, wrapped))

    def first_pass_reason(
        self, batch: GenerationBatch, covered_by_first_update: bool
    ) -> str | None:
        """Why a no-grad policy pass over the batch must come before the update, or None."""
        settings = self.settings
        if not covered_by_first_update:
            return (
                "later optimizer steps reuse the completions, and need their log-probs as sampled"
            )
        if settings.truncated_importance_sampling is not None:
            return "truncated importance sampling weights the loss by the log-probs it finds"
        if not settings.kl_in_reward:
            return None
        if settings.normalize_advantages or settings.whiten_rewards:
            return "normalising needs the KL of the whole generation batch first"
        if self.has_dropout:
            return (
                "the model has dropout, which would put noise into the KL of the training forward"
            )
        return self.planner.why_groups_are_split(batch)

    def with_reference(self, batch: PreparedBatch, wrapped: nn.Module) -> PreparedBatch:
        """With the reference model's log-probs of the completions; unchanged at beta = 0."""
        if self.settings.beta == 0:
            return batch
        fp8 = self.reference_head_fp8
        if self.reference is not None:
            logps, _ = self._logps(batch.generation, self.reference, None, fp8)
        else:
            model = self.policy.model
            if not start_weights(model).is_taken:  # an engine has split the model since
                start_weights(model).take()
            with self._evaluating(), reference_weights(model):
                logps, _ = self._logps(batch.generation, self.policy, wrapped, fp8)
        return replace(batch, ref_logps=logps)

    def with_old_logps(self, batch: PreparedBatch, wrapped: nn.Module) -> PreparedBatch:
        """With old log-probs and entropies by a no-grad pass over all rows.

        Raises ValueError if truncated importance sampling is asked for and there is nothing to
        compare those log-probs with.
        """
        level, generation = self.settings.truncated_importance_sampling, batch.generation
        if level is not None and generation.sampler_logps is None:
            raise ValueError(
                f"truncated_importance_sampling={level!r} needs the log-probs that the tokens were "
                "sampled with, and the rollout engine gave none: leave it out."
            )
        with self._evaluating():
            logps, entropy = self._logps(generation, self.policy, wrapped)
        summed = segment_sum(entropy, generation.cu_seqlens)
        return replace(batch, old_logps=logps, old_entropy=summed, token_entropy=entropy)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """While open, the policy computes without dropout."""
        training = self.policy.model.training
        self.policy.model.eval()
        try:
            yield
        finally:
            self.policy.model.train(training)

    def _logps(
        self,
        batch: GenerationBatch,
        policy: Policy,
        wrapped: nn.Module | None,
        fp8_head: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(log-probs, entropies) of every counted completion token: (N,) each, on the CPU."""
        planner, every_row = self.planner, list(range(batch.num_rows))
        # kept on the device until the pass ends: a copy after each micro-batch would wait for it
        rows: list[list[int]] = []
        found: list[Tensor] = []  # (2, N) of a micro-batch

        def run_one(plan: MicroBatchPlan, last: bool) -> None:
            micro_batch = planner.micro_batch(batch, plan)
            with torch.no_grad(), self.accelerator.autocast():
                made = policy.logps(micro_batch, wrapped, fp8_head=fp8_head)
            if micro_batch.rows:
                rows.append(micro_batch.rows)
                found.append(torch.stack([made.logps.float(), made.entropy.float()]))

        while True:
            plans = planner.plan(batch, every_row, split=True, max_rows=self.rows_per_pass)
            filler = planner.filler(batch, max_rows=self.rows_per_pass)
            plans = equal_numbers(plans, filler, self.accelerator)
            if self.runner.run(plans, run_one, last_synchronises=False):
                self.parallel.release_weights(policy.model)
                whole = torch.empty(2, sum(batch.num_tokens), dtype=torch.float32)
                for some, values in zip(rows, to_host(found), strict=True):
                    whole[:, batch.token_index(some)] = values
                return whole[0], whole[1]
            rows.clear()
            found.clear()
            self.runner.shrink(planner.budget, batch, plans)
