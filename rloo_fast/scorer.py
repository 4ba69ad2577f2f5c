"""What must be known of samples before their update: reference and old log-probs, advantages.

On-policy, with whole groups in a micro-batch, only the reference's log-probs: the update's own
forward gives the rest (`update.py`).
"""

from __future__ import annotations

import torch
from rloo_kernels import rloo_objective, token_level_advantages
from rloo_kernels.advantages import comparable_rows, scaled_advantages, segment_sum
from torch import Tensor, nn

from .config import RLOOConfig
from .losses import Loss
from .models import reference_weights
from .parallel import Parallel
from .planner import Planner, Step
from .policy import Policy
from .reports.metrics import gather_rows
from .truth import importance_ratios
from .types import Samples


class Scorer:
    """Passes without gradients, and KL -> reward -> advantage over all processes.

    `reference`: the frozen model, or None where the policy's adapters are put off instead.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        planner: Planner,
        args: RLOOConfig,
        parallel: Parallel,
        *,
        has_dropout: bool = False,
    ):
        self.policy, self.reference, self.planner = policy, reference, planner
        self.args, self.parallel, self.has_dropout = args, parallel, has_dropout
        self.accelerator = parallel.accelerator
        self.loss = Loss(args)

    def first_pass_reason(self, samples: Samples, covered_by_first_update: bool) -> str | None:
        """Why a no-grad policy pass over the samples must come before the update, or None."""
        if not covered_by_first_update:
            return (
                "later optimizer steps reuse the completions, and need their log-probs as sampled"
            )
        if self.args.truncated_importance_sampling is not None:
            return "truncated importance sampling weights the loss by the log-probs it finds"
        if not self.loss.kl_in_reward:
            return None
        if self.args.normalize_advantages or self.args.whiten_rewards:
            return "normalising needs the KL of the whole generation batch first"
        if self.has_dropout:
            return (
                "the model has dropout, which would put noise into the KL of the training forward"
            )
        return self.planner.why_groups_are_split(samples)

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
        """Old log-probs, KL and advantages by a no-grad pass over all rows.

        Raises ValueError if truncated importance sampling is asked for and there is nothing to
        compare those log-probs with.
        """
        level = self.args.truncated_importance_sampling
        if level is not None and samples.sampler_logps is None:
            raise ValueError(
                f"truncated_importance_sampling={level!r} needs the log-probs that the tokens were "
                "sampled with, and the rollout engine gave none: leave it out."
            )
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
        rows, every = self.args.rollout_forward_batch_size, list(range(samples.num_rows))
        logps = torch.empty(int(samples.cu_seqlens[-1]))
        entropy = torch.empty_like(logps)

        def run_one(step: Step, last: bool) -> None:
            batch = self.planner.batch(step, rows)
            with torch.no_grad(), self.accelerator.autocast():
                scores = policy.score(batch, wrapped)
            index = samples.token_index(batch.rows)
            logps[index], entropy[index] = scores.logps.cpu(), scores.entropy.cpu()

        while True:
            plan = self.planner.plan(samples, every, split=True, max_rows=rows)
            steps = self.planner.even([Step(samples, units) for units in plan], samples)
            if self.planner.run(steps, run_one, last_synchronises=False):
                self.parallel.let_go(policy.model)
                return logps, entropy
            self.planner.shrink(steps)

    # KL -> reward -> advantage

    def credit_all(self, samples: Samples) -> None:
        """samples.advantages over all processes, from old_logps where the KL is in the reward."""
        args, k = self.args, samples.num_generations
        kl = torch.zeros(int(samples.cu_seqlens[-1]))
        surprisal = torch.full((samples.num_rows,), float("nan"))
        if samples.old_logps is None:
            assert not self.loss.kl_in_reward
        else:
            surprisal = -segment_sum(samples.old_logps, samples.cu_seqlens)
            if samples.ref_logps is not None:
                kl = samples.old_logps - samples.ref_logps
        row_kl = segment_sum(kl, samples.cu_seqlens)
        shaped = samples.scores - args.beta * row_kl if self.loss.kl_in_reward else samples.scores
        samples.stats |= {"kl": row_kl, "shaped": shaped, "surprisal": surprisal}
        everyone = gather_rows(self.accelerator, {"shaped": shaped})["shaped"].to(shaped.dtype)
        if k > 1:
            advantages, scale = scaled_advantages(
                everyone,
                k,
                normalize=args.normalize_advantages,
                whiten_rewards=args.whiten_rewards,
                advantage=args.advantage,
            )
        else:  # one completion per prompt in evaluation: nothing to compare with
            advantages, scale = torch.zeros_like(everyone), torch.ones(())
        start = self.accelerator.process_index * samples.num_rows
        mine = slice(start, start + samples.num_rows)
        advantages = advantages[mine]
        if self.loss.advantages_per_token:
            compared = comparable_rows(everyone, k)[mine]
            beta = args.beta * float(scale)  # the KL is scaled as the rewards it is taken off
            advantages = token_level_advantages(advantages, kl, samples.cu_seqlens, beta, compared)
        samples.advantages = advantages

    def credited(self, samples: Samples, rows: list[int]) -> Tensor:
        """What the loss credits `rows` with: (R,) A_i, or (N,) A_it (`Loss.credit_per_token`).

        Truncated importance sampling, off by default, weights them by trainer / sampler at the
        weights that sampled (for w >= 0, the clipped objective of w A is w times that of A):

            sequence:   w_i  = min(exp(sum_t (old_it - sampler_it)), cap)    A_i  -> w_i A_i
            token:      w_it = min(exp(old_it - sampler_it), cap)            A_i  -> A_it = w_it A_i

        With "token" the ratio of the loss and its clip are per token too; the first update's
        gradient is - sum_it w_it A_i dlogp_it / B exactly. `samples.advantages` stay unweighted,
        and so does a KL in the loss.
        """
        args, index = self.args, samples.token_index(rows)
        level = args.truncated_importance_sampling
        advantages, lengths = samples.advantages, samples.cu_seqlens.diff()[rows]
        assert advantages is not None
        per_token = self.loss.advantages_per_token
        advantages = advantages[index if per_token else rows]
        if level is None:
            return advantages
        assert samples.old_logps is not None
        assert samples.sampler_logps is not None
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        old, sampler = samples.old_logps[index], samples.sampler_logps[index]
        weights = importance_ratios(old, sampler, cu_seqlens, level)
        weights = weights.clamp(max=args.importance_sampling_cap).to(advantages)
        if self.loss.credit_per_token and not per_token:
            advantages = advantages.repeat_interleave(lengths)
        if self.loss.credit_per_token and level == "sequence":
            weights = weights.repeat_interleave(lengths)
        return weights * advantages

    def credit(self, samples: Samples, rows: list[int]) -> dict[str, Tensor]:
        """`credited`, under its name in `Credit`."""
        kind = "token_advantages" if self.loss.credit_per_token else "advantages"
        return {kind: self.credited(samples, rows)}

    def on_policy_loss(self, samples: Samples) -> Tensor:
        """The loss at ratio 1, of old_logps: nothing was updated."""
        assert samples.old_logps is not None
        rows = list(range(samples.num_rows))
        return rloo_objective(
            samples.old_logps,
            samples.cu_seqlens,
            **self.credit(samples, rows),
            ref_logps=samples.ref_logps,
            denominator=self.loss.denominator(samples, rows, len(rows)),
            **self.loss.options(with_rewards=False),
        ).loss

    def settle(self, samples: Samples, logps: Tensor, advantages: Tensor | None) -> None:
        """After the first update, what its forward found out holds for the next ones: old log-probs
        (N,) and, where they were not known, advantages (R,)."""
        samples.old_logps = logps
        if samples.advantages is not None:
            return
        assert advantages is not None
        if self.loss.advantages_per_token:
            assert samples.ref_logps is not None
            advantages = token_level_advantages(
                advantages,
                logps - samples.ref_logps,
                samples.cu_seqlens,
                self.args.beta,
                comparable_rows(samples.stats["shaped"], samples.num_generations),
            )
        samples.advantages = advantages
