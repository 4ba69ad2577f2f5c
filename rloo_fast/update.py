"""Samples -> loss and gradients: KL, leave-one-out, ratio, clip, one micro-batch at a time.

On the first update after a rollout the training forward is the only policy forward: its own
log-probs, detached, are the old ones (so the ratio is exactly 1), and where a micro-batch holds
whole groups the KL and the leave-one-out baseline come out of it too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from rloo_kernels import Objective, rloo_objective, token_level_advantages
from rloo_kernels.advantages import comparable_rows, scaled_advantages, segment_sum
from torch import Tensor, nn

from .config import RLOOConfig
from .metrics import gather_rows
from .models import reference_weights
from .packing import plan_micro_batches
from .policy import Policy, TokenScores, padded_batch
from .types import MicroBatch, Samples


class Updater:
    """The loss of RLOO over Samples, and the passes it needs.

    `reference`: the frozen model, or None where the policy's adapters are put off instead.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        args: RLOOConfig,
        accelerator: Accelerator,
        *,
        pad_token_id: int,
        aux_loss_coef: float = 0.0,
        has_dropout: bool = False,
    ):
        self.policy, self.reference, self.args = policy, reference, args
        self.accelerator, self.pad_token_id = accelerator, pad_token_id
        self.aux_loss_coef, self.has_dropout = aux_loss_coef, has_dropout
        self.epsilon_low = args.epsilon
        self.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high

    # What must be known before the first update

    def first_pass_reason(self, samples: Samples, covered_by_first_update: bool) -> str | None:
        """Why a no-grad policy pass over the samples must come before the update, or None."""
        if not covered_by_first_update:
            return (
                "later optimizer steps reuse the completions, and need their log-probs as sampled"
            )
        if self.args.beta == 0:
            return None
        k, rows = samples.num_generations, self.args.per_device_train_batch_size
        if self.args.normalize_advantages or self.args.whiten_rewards:
            return "normalising needs the KL of the whole generation batch first"
        if samples.num_rows % k or k > rows:
            return (
                f"num_generations={k} completions do not fit into one micro-batch of "
                f"per_device_train_batch_size={rows}"
            )
        if self.has_dropout:
            return (
                "the model has dropout, which would put noise into the KL of the training forward"
            )
        return None

    def score_reference(self, samples: Samples, wrapped: nn.Module) -> None:
        """samples.ref_logps: the reference model's log-probs of the completions."""
        if self.args.beta == 0:
            return
        if self.reference is not None:
            samples.ref_logps = self._score(samples, self.reference, None)[0]
        else:
            with reference_weights(self.policy.model):
                samples.ref_logps = self._score(samples, self.policy, wrapped)[0]

    def first_pass(self, samples: Samples, wrapped: nn.Module) -> None:
        """Old log-probs, KL and advantages by a no-grad pass over all rows."""
        training = self.policy.model.training
        self.policy.model.eval()
        try:
            samples.old_logps, entropy = self._score(samples, self.policy, wrapped)
        finally:
            self.policy.model.train(training)
        samples.stats["entropy"] = segment_sum(entropy, samples.cu_seqlens)
        self.credit_all(samples)

    def _score(
        self, samples: Samples, policy: Policy, wrapped: nn.Module | None
    ) -> tuple[Tensor, Tensor]:
        """(log-probs, entropies) of every counted completion token, packed, on the CPU."""
        size = self.args.rollout_forward_batch_size or self.args.per_device_train_batch_size
        lengths = self._lengths(samples, range(samples.num_rows))
        logps = torch.empty(int(samples.cu_seqlens[-1]))
        entropy = torch.empty_like(logps)
        for rows in plan_micro_batches(lengths, 1, size):
            batch = self._batch(samples, rows)
            with torch.no_grad(), self.accelerator.autocast():
                scores = policy(batch, wrapped)
            index = samples.token_index(rows)
            logps[index], entropy[index] = scores.logps.cpu(), scores.entropy.cpu()
        return logps, entropy

    # KL -> reward -> advantage

    def _note(self, samples: Samples, rows: list[int], **columns: Tensor) -> None:
        """Per-row statistics of `rows`, for the metrics."""
        for name, values in columns.items():
            column = samples.stats.setdefault(name, torch.full((samples.num_rows,), float("nan")))
            column[rows] = values.to(column)

    def credit_all(self, samples: Samples) -> None:
        """samples.advantages from old_logps (or without, at beta = 0), over all processes."""
        args, k = self.args, samples.num_generations
        kl, shaped = torch.zeros(int(samples.cu_seqlens[-1])), samples.scores
        if samples.old_logps is None:
            assert args.beta == 0
        else:
            if samples.ref_logps is not None:
                kl = samples.old_logps - samples.ref_logps
            row_kl = segment_sum(kl, samples.cu_seqlens)
            shaped = samples.scores - args.beta * row_kl
            surprisal = -segment_sum(samples.old_logps, samples.cu_seqlens)
            rows = list(range(samples.num_rows))
            self._note(samples, rows, kl=row_kl, shaped=shaped, surprisal=surprisal)
        everyone = gather_rows(self.accelerator, {"shaped": shaped})["shaped"].to(shaped.dtype)
        if k > 1:
            advantages, scale = scaled_advantages(
                everyone, k, normalize=args.normalize_advantages, whiten_rewards=args.whiten_rewards
            )
        else:  # one completion per prompt in evaluation: nothing to compare with
            advantages, scale = torch.zeros_like(everyone), torch.ones(())
        start = self.accelerator.process_index * samples.num_rows
        mine = slice(start, start + samples.num_rows)
        advantages = advantages[mine]
        if args.token_level_kl:
            compared = comparable_rows(everyone, k)[mine]
            beta = args.beta * float(scale)  # the KL is scaled as the rewards it is taken off
            advantages = token_level_advantages(advantages, kl, samples.cu_seqlens, beta, compared)
        samples.advantages = advantages

    def on_policy_loss(self, samples: Samples) -> Tensor:
        """- mean over rows of A_i (of sum_t A_it with token-level KL): the loss at ratio 1."""
        advantages = samples.advantages
        assert advantages is not None
        if self.args.token_level_kl:
            advantages = segment_sum(advantages, samples.cu_seqlens)
        return -advantages.mean()

    # The update

    def backward(
        self,
        pieces: list[tuple[Samples, list[int]]],
        wrapped: nn.Module,
        compute_loss: Callable[[nn.Module, Any], Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients of one optimizer step; returns its loss and the per-row statistics.

        The loss is the sum over this process' rows of the step divided by their number; with the
        mean over processes that the engines take of gradients, the mean over all rows.
        """
        steps = [(piece, batch_rows) for piece in pieces for batch_rows in self._plan(*piece)]
        num_rows = sum(len(rows) for _, rows in pieces)
        total = torch.zeros((), device=self.accelerator.device)
        statistics: list[dict[str, Tensor]] = []
        for i, ((samples, piece_rows), rows) in enumerate(steps):
            last = i == len(steps) - 1
            batch = self._batch(samples, rows)
            inputs = {"samples": samples, "batch": batch, "num_rows": num_rows}
            with self._sync(wrapped, last):
                loss = compute_loss(wrapped, inputs)
                self.accelerator.backward(loss)
            total += loss.detach()
            statistics.append({**inputs["statistics"], "micro_batch": torch.full((len(rows),), i)})
            if last or steps[i + 1][0][1] is not piece_rows:
                self._settle(samples)
        columns = {name: torch.cat([s[name].cpu() for s in statistics]) for name in statistics[0]}
        return total, columns

    def _plan(self, samples: Samples, rows: list[int]) -> list[list[int]]:
        """Micro-batches of `rows`; whole groups where the advantages are still to be made."""
        k = samples.num_generations if samples.advantages is None else 1
        lengths = self._lengths(samples, rows)
        plan = plan_micro_batches(lengths, k, self.args.per_device_train_batch_size)
        return [[rows[i] for i in batch] for batch in plan]

    def _settle(self, samples: Samples) -> None:
        """After a batch's first pass of updates, what it found out holds for the next ones."""
        if (logps := samples.stats.pop("new_old_logps", None)) is not None:
            samples.old_logps = logps
        if (advantages := samples.stats.pop("new_advantages", None)) is not None:
            if self.args.token_level_kl and samples.ref_logps is not None:
                assert samples.old_logps is not None
                advantages = token_level_advantages(
                    advantages,
                    samples.old_logps - samples.ref_logps,
                    samples.cu_seqlens,
                    self.args.beta,
                    comparable_rows(samples.stats["shaped"], samples.num_generations),
                )
            samples.advantages = advantages

    def loss(self, wrapped: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The loss of one micro-batch; leaves its per-row statistics in inputs["statistics"].

        `inputs`: samples, batch (a MicroBatch of rows of the samples), num_rows (of this step on
        this process; every process has the same).
        """
        samples: Samples = inputs["samples"]
        batch: MicroBatch = inputs["batch"]
        with self.accelerator.autocast():
            scores = self.policy(batch, wrapped)
        objective = self._objective(samples, batch, scores, inputs["num_rows"])
        loss = objective.loss
        if scores.aux_loss is not None:
            share = len(batch.rows) / inputs["num_rows"]
            loss = loss + self.aux_loss_coef * share * scores.aux_loss
        inputs["statistics"] = {
            "tokens": objective.num_tokens,
            "entropy": objective.entropy_sum,
            "low": objective.clipped_low,
            "high": objective.clipped_high,
            "log_ratio": objective.log_ratio,
            "token_ratio": objective.token_ratio_sum,
            "loss": objective.loss_per_row,
        }
        if scores.aux_loss is not None:
            inputs["statistics"]["aux_loss"] = scores.aux_loss.detach().expand(len(batch.rows))
        return loss

    def _objective(
        self, samples: Samples, batch: MicroBatch, scores: TokenScores, num_rows: int
    ) -> Objective:
        index, rows = samples.token_index(batch.rows), torch.tensor(batch.rows)
        token_level = self.args.token_level_kl
        credit: dict[str, Any]
        if samples.advantages is None:  # whole groups: their KL and baseline come out of this pass
            credit = {
                "rewards": samples.scores[rows],
                "num_generations": samples.num_generations,
                "beta": self.args.beta,
                "kl": "reward_to_go" if token_level else "reward",
            }
        elif token_level:
            credit = {"token_advantages": samples.advantages[index]}
        else:
            credit = {"advantages": samples.advantages[rows]}
        # None: the weights are those that sampled, and the ratio is 1, exactly
        old = None
        if not samples.on_policy:
            assert samples.old_logps is not None
            old = samples.old_logps[index]
        objective = rloo_objective(
            scores.logps,
            batch.cu_seqlens,
            old_logps=old,
            ref_logps=None if samples.ref_logps is None else samples.ref_logps[index],
            entropy=scores.entropy,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            denominator=num_rows,
            level="token" if token_level else "sequence",
            **credit,
        )
        if samples.old_logps is None:
            self._keep(samples, "new_old_logps", index, scores.logps.detach())
            shaped = samples.scores[rows]
            if samples.advantages is None:
                shaped = objective.shaped_rewards
                self._keep(samples, "new_advantages", rows, objective.advantages)
            self._note(
                samples, batch.rows, kl=objective.kl, shaped=shaped, surprisal=-objective.logp_sum
            )
        return objective

    def _keep(self, samples: Samples, name: str, where: Tensor, values: Tensor) -> None:
        size = int(samples.cu_seqlens[-1]) if name == "new_old_logps" else samples.num_rows
        column = samples.stats.setdefault(name, torch.full((size,), float("nan")))
        column[where] = values.to(column)

    # Small things

    def _batch(self, samples: Samples, rows: list[int]) -> MicroBatch:
        batch = padded_batch(
            samples,
            rows,
            pad_token_id=self.pad_token_id,
            pad_to_multiple_of=self.args.pad_to_multiple_of,  # pyright: ignore
        )
        return batch.to(self.accelerator.device)

    def _lengths(self, samples: Samples, rows: Any) -> list[int]:
        return [len(samples.prompt_ids[r]) + len(samples.completion_ids[r]) for r in rows]

    def _sync(self, wrapped: nn.Module, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.accelerator.no_sync(wrapped)
