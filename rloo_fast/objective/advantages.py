"""Where advantages are made. One object decides; there are three cases.

known_before_update    of the scores alone (no KL in the reward), or with the KL of a policy pass
                       without gradients: PreparedBatch.advantages is set
out_of_the_forward     on-policy, whole groups, KL in the reward: the loss kernel makes them of
                       the log-probs of the training forward itself, and nothing is known before
after_first_update     what that forward made is kept for later updates of the same completions
"""

# accelerate has no stubs
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

from dataclasses import replace

import torch
from accelerate import Accelerator
from rloo_kernels import token_level_advantages
from rloo_kernels.loss.advantages import comparable_rows, scaled_advantages
from rloo_kernels.loss.packed import segment_sum
from torch import Tensor

from ..distributed.collectives import gather_rows
from ..records import NAN, LossInputs, PolicyRows, PreparedBatch
from .importance import weighted_advantages
from .settings import LossSettings


class AdvantageMaker:
    """Scores, KL -> advantages, over the groups of all processes."""

    def __init__(self, settings: LossSettings, accelerator: Accelerator):
        self.settings, self.accelerator = settings, accelerator

    def known_before_update(self, batch: PreparedBatch) -> PreparedBatch:
        """The batch with advantages and what metrics say of its rows, unless they are to come
        `out_of_the_forward`: then it is returned as it is."""
        settings, generation = self.settings, batch.generation
        if settings.kl_in_reward and batch.old_logps is None:
            return batch
        kl = torch.zeros(sum(generation.num_tokens), dtype=torch.float32)
        surprisal = torch.full((generation.num_rows,), float("nan"), dtype=torch.float32)
        if batch.old_logps is not None:
            surprisal = -segment_sum(batch.old_logps, generation.cu_seqlens)
            if batch.ref_logps is not None:
                kl = batch.old_logps - batch.ref_logps
        row_kl = segment_sum(kl, generation.cu_seqlens)
        shaped = generation.scores
        if settings.kl_in_reward:
            shaped = generation.scores - settings.beta * row_kl
        return replace(
            batch,
            advantages=self._advantages(batch, shaped, kl),
            policy_rows=PolicyRows(row_kl, shaped, surprisal),
        )

    def _advantages(self, batch: PreparedBatch, shaped: Tensor, kl: Tensor) -> Tensor:
        """(R,) of this process' rows, or (N,) with a KL to go: shaped rewards (R,), KL (N,)."""
        settings, generation = self.settings, batch.generation
        k = generation.num_generations
        everyone = gather_rows(self.accelerator, {"shaped": shaped})["shaped"].to(shaped.dtype)
        if k > 1:
            advantages, scale = scaled_advantages(
                everyone,
                k,
                normalize=settings.normalize_advantages,
                whiten_rewards=settings.whiten_rewards,
                advantage=settings.advantage,
            )
        else:  # one completion per prompt in evaluation: nothing to compare with
            advantages, scale = torch.zeros_like(everyone), everyone.new_ones(())
        start = self.accelerator.process_index * generation.num_rows
        mine = slice(start, start + generation.num_rows)
        if not settings.advantages_per_token:
            return advantages[mine]
        compared = comparable_rows(everyone, k)[mine]
        beta = settings.beta * float(scale)  # the KL is scaled as the rewards it is taken off
        return token_level_advantages(advantages[mine], kl, generation.cu_seqlens, beta, compared)

    def loss_inputs(self, batch: PreparedBatch, rows: list[int]) -> LossInputs:
        """What the loss of a micro-batch of `rows` is made of; no rows: a filler's."""
        if not rows:
            nothing = torch.zeros(0, dtype=torch.float32)
            return LossInputs(advantages=nothing, ref_logps=nothing)
        index = batch.generation.token_index(rows)
        ref = None if batch.ref_logps is None else batch.ref_logps[index]
        if batch.advantages is None:
            made = self.out_of_the_forward(batch, rows)
        else:
            made = self._given(batch, batch.advantages, rows, index)
        return made._replace(old_logps=self._old_logps(batch, rows, index), ref_logps=ref)

    def _old_logps(self, batch: PreparedBatch, rows: list[int], index: Tensor) -> Tensor | None:
        """(N,) of `rows`, what the loss's ratio is to: see `importance.py`. None, or NaN for a
        token: the ratio is 1, exactly, as the weights are those that it was sampled by."""
        generation, old = batch.generation, None
        if not batch.on_policy:
            assert batch.old_logps is not None
            old = batch.old_logps[index]
        stale = generation.stale_rows[rows]
        if self.settings.truncated_importance_sampling is not None or not stale.any():
            return old
        assert generation.sampler_logps is not None
        stale = stale.repeat_interleave(torch.tensor(generation.num_tokens)[rows])
        sampler = generation.sampler_logps[index]
        return torch.where(stale, sampler, torch.full_like(sampler, NAN) if old is None else old)

    def out_of_the_forward(self, batch: PreparedBatch, rows: list[int]) -> LossInputs:
        """Scores for the kernel, which takes KL and baseline out of the forward it is given."""
        return LossInputs(rewards=batch.generation.scores[rows])

    def _given(
        self, batch: PreparedBatch, advantages: Tensor, rows: list[int], index: Tensor
    ) -> LossInputs:
        """Known advantages of `rows`, importance-weighted where that is asked for.

        `batch.advantages` stay unweighted, and so does a KL in the loss.
        """
        settings, generation = self.settings, batch.generation
        per_token, level = settings.advantages_per_token, settings.truncated_importance_sampling
        advantages = advantages[index if per_token else rows]
        if level is not None:
            assert batch.old_logps is not None
            assert generation.sampler_logps is not None
            advantages = weighted_advantages(
                advantages,
                batch.old_logps[index],
                generation.sampler_logps[index],
                torch.tensor([generation.num_tokens[row] for row in rows]),
                level=level,
                cap=settings.importance_sampling_cap,
                advantages_per_token=per_token,
            )
        if per_token or settings.weights_per_token:
            return LossInputs(token_advantages=advantages)
        return LossInputs(advantages=advantages)

    def after_first_update(
        self, batch: PreparedBatch, logps: Tensor, rows: PolicyRows, made: Tensor
    ) -> PreparedBatch:
        """The batch with what its first update computed: log-probs (N,) are the old ones of later
        updates, `rows` what metrics say, and `made` (R,) the advantages that came out of its
        forward, where none were known before."""
        batch = replace(batch, old_logps=logps, policy_rows=rows)
        if batch.advantages is not None:
            return batch
        if self.settings.advantages_per_token:
            assert batch.ref_logps is not None
            made = token_level_advantages(
                made,
                logps - batch.ref_logps,
                batch.generation.cu_seqlens,
                self.settings.beta,
                comparable_rows(rows.shaped_reward, batch.generation.num_generations),
            )
        return replace(batch, advantages=made)
