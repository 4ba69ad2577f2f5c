"""Samples -> loss and gradients of one optimizer step, one micro-batch at a time.

On the first update after a rollout the training forward is the only policy forward: its own
log-probs, detached, are the old ones (so the ratio is exactly 1), and where a micro-batch holds
whole groups the KL and the leave-one-out baseline come out of it too. Rows whose gradient is known
to be 0 are not run.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rloo_kernels import Objective
from rloo_kernels.advantages import segment_sum
from torch import Tensor, nn

from .attention import restore
from .config import RLOOConfig
from .models import base_causal_lm
from .parallel import Parallel
from .planner import Planner, Step
from .policy import Policy
from .scorer import Scorer
from .types import Credit, MicroBatch, Samples

Piece = tuple[Samples, list[int]]  # a generation batch, and its rows that a step takes
NAN = float("nan")
# per row of a step, and what it is for a row that was not run
STATISTICS = {
    "ran": 0.0,
    "entropy": NAN,
    "low": 0.0,
    "high": 0.0,
    "log_ratio": 0.0,
    "token_ratio": 0.0,
    "loss": 0.0,
    "micro_batch": -1.0,
    "aux_loss": NAN,
}


@dataclass
class Found:
    """What an attempt at a step has found out; nothing of it is kept if memory runs out."""

    loss: Tensor
    columns: list[dict[str, Tensor]]  # per piece: STATISTICS by row of its samples
    logps: dict[int, Tensor] = field(default_factory=dict)  # by id(samples): (N,)
    per_row: dict[int, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    num_batches: int = 0  # fillers included
    num_tokens_run: int = 0


class Updater:
    """The loss of RLOO over Samples, and its gradient."""

    def __init__(
        self,
        policy: Policy,
        scorer: Scorer,
        planner: Planner,
        args: RLOOConfig,
        parallel: Parallel,
        *,
        aux_loss_coef: float = 0.0,
    ):
        self.policy, self.scorer, self.planner = policy, scorer, planner
        self.args, self.parallel, self.accelerator = args, parallel, parallel.accelerator
        self.aux_loss_coef = aux_loss_coef

    def backward(
        self,
        pieces: list[Piece],
        wrapped: nn.Module,
        compute_loss: Callable[[nn.Module, Any], Tensor],
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
        """Gradients of one optimizer step; returns its loss, statistics per row, and counts.

        The loss is the sum over this process' rows of the step, divided as `losses.py` says: with
        the mean over processes that the engines take of gradients, by a count over all of them.
        Without memory for it, the step is taken again from its start, in smaller micro-batches.
        """
        pieces = self._cut(pieces)
        while True:
            steps = self._steps(pieces)
            found = self._attempt(pieces, steps, wrapped, compute_loss)
            if found is not None:
                break
            wrapped.zero_grad(set_to_none=True)
            restore(base_causal_lm(self.policy.model))  # a backward that failed leaves it switched
            self.planner.shrink(steps)
            for samples in _distinct(pieces):
                if samples.advantages is None and self.planner.why_groups_are_split(samples):
                    self.scorer.first_pass(samples, wrapped)
        for samples in _distinct(pieces):
            self._keep(samples, found)
        columns = [
            {name: values[rows] for name, values in column.items()}
            for column, (_, rows) in zip(found.columns, pieces, strict=True)
        ]
        together = {name: torch.cat([c[name] for c in columns]) for name in columns[0]}
        if not self.aux_loss_coef:
            del together["aux_loss"]
        return found.loss, together, self._counts(pieces, found)

    def _cut(self, pieces: list[Piece]) -> list[Piece]:
        """Pieces of one denominator each; no micro-batch holds rows of two of them."""
        if not self.scorer.loss.by_micro_step:
            return pieces
        size = self.args.per_device_train_batch_size
        return [
            (samples, rows[i : i + size])
            for samples, rows in pieces
            for i in range(0, len(rows), size)
        ]

    def _steps(self, pieces: list[Piece]) -> list[Step]:
        steps = []
        for number, (samples, rows) in enumerate(pieces):
            # advantages still to be made: whole groups, so that they come out of the forward
            known = samples.advantages is not None
            plan = self.planner.plan(samples, self._rows_with_signal(samples, rows), split=known)
            steps += [Step(samples, units, number) for units in plan]
        return self.planner.even(steps, pieces[-1][0])

    def _rows_with_signal(self, samples: Samples, rows: list[int]) -> list[int]:
        """Without those whose gradient is known to be 0."""
        if samples.advantages is None or self.aux_loss_coef:
            return rows
        signal = samples.cu_seqlens.diff() > 0
        if self.scorer.loss.advantages_per_token:
            moves = (samples.advantages != 0).float()
            signal &= segment_sum(moves, samples.cu_seqlens) > 0
        elif not self.scorer.loss.kl_in_loss:  # a KL in the loss moves every row
            signal &= samples.advantages != 0
        return [row for row, moves in zip(rows, signal[rows].tolist(), strict=True) if moves]

    def _attempt(
        self,
        pieces: list[Piece],
        steps: list[Step],
        wrapped: nn.Module,
        compute_loss: Callable[[nn.Module, Any], Tensor],
    ) -> Found | None:
        num_rows = sum(len(rows) for _, rows in pieces)
        denominators = [self.scorer.loss.denominator(s, rows, num_rows) for s, rows in pieces]
        empty = [
            {name: torch.full((s.num_rows,), value) for name, value in STATISTICS.items()}
            for s, _ in pieces
        ]
        for column, (samples, _) in zip(empty, pieces, strict=True):
            column["tokens"] = samples.cu_seqlens.diff().float()
            if samples.on_policy and "entropy" in samples.stats:  # of the first pass
                column["entropy"] = samples.stats["entropy"].to(column["entropy"], copy=True)
        found = Found(torch.zeros((), device=self.accelerator.device), empty)
        before, numbers = self.policy.num_tokens_run, itertools.count()

        def run_one(step: Step, last: bool) -> None:
            batch = self.planner.batch(step)
            inputs = {
                "samples": step.samples,
                "batch": batch,
                "num_rows": num_rows,
                "denominator": denominators[step.piece],
            }
            with self.parallel.reducing(wrapped, last):
                loss = compute_loss(wrapped, inputs)
                self.parallel.backward(loss, last)
            found.loss += loss.detach()
            if batch.rows:
                self._record(found, step, batch, inputs, next(numbers))

        if not self.planner.run(steps, run_one, last_synchronises=True):
            return None
        found.num_batches = len(steps)
        found.num_tokens_run = self.policy.num_tokens_run - before
        return found

    def loss(self, wrapped: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The loss of one micro-batch; leaves its `objective` and `aux_loss` in `inputs`.

        `inputs`: samples, batch (a MicroBatch of rows of the samples), denominator (of the sum over
        these rows), num_rows (of this step on this process; every process has the same).
        """
        samples: Samples = inputs["samples"]
        batch: MicroBatch = inputs["batch"]
        # the loss' gradients are made in its forward: in fp16 they must be scaled there already
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        credit = self._credit(samples, batch)
        with_rewards = credit.rewards is not None
        options = self.scorer.loss.options(with_rewards=with_rewards)
        options["denominator"] = inputs["denominator"] / scale
        options["num_generations"] = samples.num_generations if with_rewards else 0
        router_loss = self.aux_loss_coef != 0 and bool(batch.rows)
        with self.accelerator.autocast():
            objective, aux = self.policy.loss(
                batch, credit, options, wrapped, router_loss=router_loss
            )
        inputs["objective"], inputs["aux_loss"] = objective, aux
        loss = objective.loss / scale
        if aux is None:
            return loss
        share = len(batch.rows) / inputs["num_rows"]
        return loss + self.aux_loss_coef * share * aux

    def _credit(self, samples: Samples, batch: MicroBatch) -> Credit:
        if not batch.rows:
            return Credit(advantages=torch.zeros(0), ref_logps=torch.zeros(0))
        index = samples.token_index(batch.rows)
        ref = None if samples.ref_logps is None else samples.ref_logps[index]
        # None: the weights are those that sampled, and the ratio is 1, exactly
        old = None
        if not samples.on_policy:
            assert samples.old_logps is not None
            old = samples.old_logps[index]
        if samples.advantages is None:  # whole groups: KL and baseline come out of this pass
            return Credit(rewards=samples.scores[batch.rows], old_logps=old, ref_logps=ref)
        credit = self.scorer.credit(samples, batch.rows)
        return Credit(**credit, old_logps=old, ref_logps=ref)

    # What the step has found out

    def _record(
        self, found: Found, step: Step, batch: MicroBatch, inputs: dict[str, Any], number: int
    ) -> None:
        """Statistics of the `number`-th micro-batch that has rows."""
        samples, objective, aux = step.samples, inputs["objective"], inputs["aux_loss"]
        assert isinstance(objective, Objective)
        columns, rows = found.columns[step.piece], torch.tensor(batch.rows)
        values = {
            "ran": torch.ones(len(rows)),
            "entropy": objective.entropy_sum,
            "low": objective.clipped_low,
            "high": objective.clipped_high,
            "log_ratio": objective.log_ratio,
            "token_ratio": objective.token_ratio_sum,
            # so that the mean over rows is the loss of the step
            "loss": objective.loss_per_row * (inputs["num_rows"] / inputs["denominator"]),
            "micro_batch": torch.full((len(rows),), float(number)),
        }
        if aux is not None:
            values["aux_loss"] = aux.detach().expand(len(rows))
        for name, value in values.items():
            columns[name][rows] = value.detach().to(columns[name])
        if samples.old_logps is not None:
            return
        logps = found.logps.setdefault(id(samples), torch.full((int(samples.cu_seqlens[-1]),), NAN))
        assert objective.logps is not None
        logps[samples.token_index(batch.rows)] = objective.logps.detach().to(logps)
        per_row = {"kl": objective.kl, "surprisal": -objective.logp_sum}
        if samples.advantages is None:
            per_row |= {"shaped": objective.shaped_rewards, "advantages": objective.advantages}
        for name, value in per_row.items():
            column = found.per_row[id(samples)].setdefault(
                name, samples.stats.get(name, torch.full((samples.num_rows,), NAN)).clone()
            )
            column[rows] = value.detach().to(column)

    def _keep(self, samples: Samples, found: Found) -> None:
        """What the step found out of a generation batch that it was the first to use."""
        if id(samples) not in found.logps:
            return
        per_row = dict(found.per_row[id(samples)])
        advantages = per_row.pop("advantages", None)
        samples.stats |= per_row
        self.scorer.settle(samples, found.logps[id(samples)], advantages)

    def _counts(self, pieces: list[Piece], found: Found) -> dict[str, float]:
        """Tokens and micro-batches of the step, and its groups that were not run."""
        groups: dict[tuple[int, int], bool] = {}
        for (samples, rows), columns in zip(pieces, found.columns, strict=True):
            for row, ran in zip(rows, columns["ran"][rows].tolist(), strict=True):
                key = id(samples), samples.groups[row]
                groups[key] = groups.get(key, False) or bool(ran)
        return {
            "tokens_run": found.num_tokens_run,
            "micro_batches": found.num_batches,
            "groups": len(groups),
            "groups_not_run": len(groups) - sum(groups.values()),
        }


def _distinct(pieces: list[Piece]) -> list[Samples]:
    return list({id(samples): samples for samples, _ in pieces}.values())
