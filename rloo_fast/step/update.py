"""Update: pieces of prepared batches in, loss and gradients of one optimizer step out.

On the first update after a rollout the training forward is the only policy forward: its own
log-probs, detached, are the old ones (so the ratio is exactly 1), and where a micro-batch holds
whole groups the KL and the leave-one-out baseline come out of it too. Rows whose gradient is known
to be 0 are not run.

Between the first and the last micro-batch of a step the host looks at nothing on the device, so
that it builds the next micro-batch while the device works: what the step finds out is kept there,
and comes over in one copy at the end. Waits that are left are not ours: a mixture-of-experts model
that loops over the experts hit, DDP with find_unused_parameters, rotary embeddings that look for
the longest position, and DeepSpeed's check for overflow in fp16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import NamedTuple

import torch
from accelerate import Accelerator
from rloo_kernels.loss.packed import segment_sum
from rloo_kernels.transfer import to_host
from torch import Tensor, nn

from ..batching.planner import Planner
from ..batching.retry import MicroBatchRunner, equal_numbers
from ..distributed import TrainingEngine
from ..objective.advantages import AdvantageMaker
from ..objective.settings import LossSettings
from ..policy.forward import Policy
from ..record_rows import concatenate, take_rows
from ..records import (
    NAN,
    MicroBatch,
    MicroBatchInputs,
    MicroBatchPlan,
    MicroBatchResult,
    Piece,
    PolicyRows,
    PreparedBatch,
    StepPlan,
    StepResult,
    UpdateRows,
)

# RLOOTrainer.compute_loss: (wrapped model, inputs) -> (loss, result)
ComputeLoss = Callable[[nn.Module, MicroBatchInputs], tuple[Tensor, MicroBatchResult]]


class Updater:
    """Plans an optimizer step, and runs its micro-batches forward and backward."""

    def __init__(
        self,
        policy: Policy,
        planner: Planner,
        runner: MicroBatchRunner,
        advantages: AdvantageMaker,
        settings: LossSettings,
        parallel: TrainingEngine,
        *,
        rows_per_micro_step: int,
        aux_loss_coef: float = 0.0,
    ):
        self.policy, self.planner, self.runner = policy, planner, runner
        self.advantages, self.settings, self.parallel = advantages, settings, parallel
        self.rows_per_micro_step, self.aux_loss_coef = rows_per_micro_step, aux_loss_coef
        self.accelerator: Accelerator = parallel.accelerator

    def plan(self, pieces: list[Piece]) -> StepPlan:
        """What the step will run: as many micro-batches on every process."""
        pieces = self.settings.pieces(pieces, self.rows_per_micro_step)
        micro_batches: list[MicroBatchPlan] = []
        for number, piece in enumerate(pieces):
            # advantages still to be made: whole groups, so that they come out of the forward
            known = piece.batch.advantages is not None
            rows = self._rows_with_gradient(piece)
            micro_batches += self.planner.plan(
                piece.batch.generation, rows, split=known, piece=number
            )
        filler = self.planner.filler(pieces[-1].batch.generation)
        step_rows = sum(len(piece.rows) for piece in pieces)
        return StepPlan(
            pieces=pieces,
            micro_batches=equal_numbers(micro_batches, filler, self.accelerator),
            denominators=[
                self.settings.denominator(piece.batch.generation, piece.rows, step_rows)
                for piece in pieces
            ],
        )

    def _rows_with_gradient(self, piece: Piece) -> list[int]:
        """Without those whose gradient is known to be 0."""
        batch, generation = piece.batch, piece.batch.generation
        if batch.advantages is None or self.aux_loss_coef:
            return piece.rows
        moves = torch.tensor(generation.num_tokens) > 0
        if self.settings.advantages_per_token:
            nonzero = (batch.advantages != 0).float()
            moves &= segment_sum(nonzero, generation.cu_seqlens) > 0
        elif not self.settings.kl_in_loss:  # a KL in the loss moves every row
            moves &= batch.advantages != 0
        kept = moves[piece.rows].tolist()
        return [row for row, moved in zip(piece.rows, kept, strict=True) if moved]

    def attempt(
        self, plan: StepPlan, wrapped: nn.Module, compute_loss: ComputeLoss
    ) -> StepResult | None:
        """Forward and backward of every micro-batch; None if a process ran out of memory."""
        found = _Accumulators(plan, self.accelerator.device)
        tokens_before = self.policy.num_tokens_run
        # the loss' gradients are made in its forward: in fp16 they must be scaled there already.
        # The scale changes with optimizer steps alone, and reading it waits for the device
        scaler = self.accelerator.scaler
        loss_scale = 1.0 if scaler is None else scaler.get_scale()

        def run_one(planned: MicroBatchPlan, last: bool) -> None:
            batch = plan.pieces[planned.piece].batch
            micro_batch = self.planner.micro_batch(batch.generation, planned)
            inputs = replace(self._inputs(plan, planned, micro_batch), loss_scale=loss_scale)
            with self.parallel.reducing(wrapped, last):
                loss, result = compute_loss(wrapped, inputs)
                self.parallel.backward(loss, last)
            found.loss += loss.detach()
            if micro_batch.rows:
                found.record(planned.piece, inputs, result)

        if not self.runner.run(plan.micro_batches, run_one, last_synchronises=True):
            return None
        return found.result(self.advantages, self.policy.num_tokens_run - tokens_before)

    def _inputs(
        self, plan: StepPlan, planned: MicroBatchPlan, micro_batch: MicroBatch
    ) -> MicroBatchInputs:
        batch = plan.pieces[planned.piece].batch
        loss_inputs = self.advantages.loss_inputs(batch, micro_batch.rows)
        makes_advantages = loss_inputs.rewards is not None
        return MicroBatchInputs(
            micro_batch,
            loss_inputs,
            num_generations=batch.generation.num_generations if makes_advantages else 0,
            denominator=plan.denominators[planned.piece],
            num_rows=plan.num_rows,
        )

    def loss(self, wrapped: nn.Module, inputs: MicroBatchInputs) -> tuple[Tensor, MicroBatchResult]:
        """The loss of one micro-batch, as a share of the step's, and what it is made of."""
        scale = inputs.loss_scale
        options = self.settings.kernel_options(makes_advantages=inputs.num_generations > 0)
        options["denominator"] = inputs.denominator / scale
        options["num_generations"] = inputs.num_generations
        rows = inputs.micro_batch.rows
        router_loss = self.aux_loss_coef != 0 and bool(rows)
        with self.accelerator.autocast():
            objective, aux = self.policy.loss(
                inputs.micro_batch, inputs.loss_inputs, options, wrapped, router_loss=router_loss
            )
        loss, result = objective.loss / scale, MicroBatchResult(objective, aux)
        if aux is not None:
            loss = loss + self.aux_loss_coef * len(rows) / inputs.num_rows * aux
        return loss, result


class _Found(NamedTuple):
    """What one micro-batch has found out, fp32 and on the device."""

    piece: int
    rows: list[int]
    values: dict[str, Tensor]  # (R,), (N,) the log-probs, () what all rows share


class _Accumulators:
    """Accumulators of one attempt at a step, dropped when memory runs out."""

    def __init__(self, plan: StepPlan, device: torch.device):
        self.plan = plan
        self.loss = torch.zeros((), dtype=torch.float32, device=device)
        self.found: list[_Found] = []  # of the micro-batches with rows

    def record(self, piece_number: int, inputs: MicroBatchInputs, result: MicroBatchResult) -> None:
        """Keep the statistics of a micro-batch that has rows."""
        piece, objective = self.plan.pieces[piece_number], result.objective
        values = {
            "entropy": objective.entropy_sum,
            "clipped_low": objective.clipped_low,
            "clipped_high": objective.clipped_high,
            "log_ratio": objective.log_ratio,
            "token_ratio": objective.token_ratio_sum,
            # so that the mean over rows is the loss of the step
            "loss": objective.loss_per_row * (inputs.num_rows / inputs.denominator),
        }
        if result.aux_loss is not None:
            values["aux_loss"] = result.aux_loss
        if piece.batch.old_logps is None:
            assert objective.logps is not None
            values |= {"logps": objective.logps, "kl": objective.kl}
            if objective.entropy is not None:
                values["token_entropy"] = objective.entropy
            values["surprisal"] = -objective.logp_sum
            if piece.batch.advantages is None:
                values["shaped_reward"] = objective.shaped_rewards
                values["advantages"] = objective.advantages
        values = {name: value.detach().to(torch.float32) for name, value in values.items()}
        self.found.append(_Found(piece_number, inputs.micro_batch.rows, values))

    def _fetched(self) -> Iterator[_Found]:
        """What was found, on the host, by one copy."""
        fetched = iter(to_host([value for found in self.found for value in found.values.values()]))
        for found in self.found:
            yield found._replace(values={name: next(fetched) for name in found.values})

    def result(self, advantages: AdvantageMaker, num_tokens_run: int) -> StepResult:
        by_piece = [_columns(piece.batch) for piece in self.plan.pieces]  # by row of the batch
        first_uses: dict[int, _FirstUse] = {}  # by number of the batch
        for number, found in enumerate(self._fetched()):
            piece, columns = self.plan.pieces[found.piece], by_piece[found.piece]
            if piece.batch.old_logps is None:
                if piece.number not in first_uses:
                    first_uses[piece.number] = _FirstUse(piece.batch)
                first_uses[piece.number].take(found.rows, found.values)
            columns["ran"][found.rows], columns["micro_batch"][found.rows] = 1.0, number
            for name in columns.keys() & found.values.keys():
                columns[name][found.rows] = found.values[name]
        known = {number: first.settled(advantages) for number, first in first_uses.items()}
        ran: dict[tuple[int, int], bool] = {}  # by (batch, group)
        rows: list[UpdateRows] = []
        for piece, columns in zip(self.plan.pieces, by_piece, strict=True):
            rows.append(take_rows(UpdateRows(**columns), piece.rows))
            for row in piece.rows:
                group = piece.number, piece.batch.generation.groups[row]
                ran[group] = ran.get(group, False) or bool(columns["ran"][row])
        return StepResult(
            loss=self.loss,
            rows=concatenate(rows),
            pieces=[
                piece._replace(batch=known.get(piece.number, piece.batch))
                for piece in self.plan.pieces
            ],
            num_micro_batches=len(self.plan.micro_batches),
            num_tokens_run=num_tokens_run,
            num_groups=len(ran),
            num_groups_not_run=len(ran) - sum(ran.values()),
        )


def _columns(batch: PreparedBatch) -> dict[str, Tensor]:
    """The columns of UpdateRows for every row of a batch, as of rows that are not run."""
    columns = vars(UpdateRows.not_run(batch.generation.num_rows)).copy()
    columns["tokens"] = torch.tensor(batch.generation.num_tokens, dtype=torch.float)
    if batch.on_policy and batch.old_entropy is not None:
        columns["entropy"] = batch.old_entropy.to(columns["entropy"], copy=True)
    return columns


class _FirstUse:
    """Log-probs and metric columns of a batch, made by the first update that uses it."""

    def __init__(self, batch: PreparedBatch):
        self.batch = batch
        num_rows = batch.generation.num_rows
        num_tokens = sum(batch.generation.num_tokens)
        self.logps = torch.full((num_tokens,), NAN, dtype=torch.float32)
        self.token_entropy = torch.full_like(self.logps, NAN)
        self.advantages = torch.full((num_rows,), NAN, dtype=torch.float32)
        nothing = [torch.full((num_rows,), NAN, dtype=torch.float32) for _ in fields(PolicyRows)]
        rows = batch.policy_rows or PolicyRows(*nothing)
        self.kl, self.shaped_reward = rows.kl.clone(), rows.shaped_reward.clone()
        self.surprisal = rows.surprisal.clone()

    def take(self, rows: list[int], values: dict[str, Tensor]) -> None:
        """The values of a micro-batch of `rows`."""
        index = self.batch.generation.token_index(rows)
        self.logps[index] = values["logps"]
        if "token_entropy" in values:
            self.token_entropy[index] = values["token_entropy"]
        self.kl[rows], self.surprisal[rows] = values["kl"], values["surprisal"]
        if self.batch.advantages is None:
            self.shaped_reward[rows] = values["shaped_reward"]
            self.advantages[rows] = values["advantages"]

    def settled(self, advantages: AdvantageMaker) -> PreparedBatch:
        rows = PolicyRows(self.kl, self.shaped_reward, self.surprisal)
        batch = replace(self.batch, token_entropy=self.token_entropy)
        return advantages.after_first_update(batch, self.logps, rows, self.advantages)
