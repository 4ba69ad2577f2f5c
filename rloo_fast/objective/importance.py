"""Sampler and trainer log-probs in, truncated importance weights out.

    token:      w_it = min(exp(old_it - sampler_it), cap)
    sequence:   w_i  = min(exp(sum_t (old_it - sampler_it)), cap)

`old`: of the trainer, before the first update on the completions; `sampler`: as they were drawn.
Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".

Rows that older weights sampled (`GenerationBatch.stale_rows`), pi the policy that is trained. The
exact gradient of the expected reward is E_sampler[rho_i A_i dlog pi(y_i)], with rho_i = exp(sum_t
(logp_it - sampler_it)): unbiased, of a variance that grows like exp(sum of the tokens' KL), as the
weights' mean is 1 whatever their spread.

    truncated_importance_sampling   the loss has               its gradient on the first update
    None         old := sampler in stale rows, and its own     rho_i A_i dlogp, but 0 where rho_i
                 ratio and clip, per completion or token       is beyond the clip that A_i points to
    "sequence"   w_i A_i in place of A_i, ratio to old         w_i A_i dlogp
    "token"      w_it A_i, ratio to old, both per token        w_it A_i dlogp_it

None is PPO's objective with the sampler as its old policy. It is biased by what the clip leaves
out: of improved completions those that rose by epsilon already, of worse ones those that fell. It
has no bound on rho_i where A_i < 0 and the completion became likelier, so over thousands of tokens
one completion may outweigh all others. It needs no pass before the update. The two weights are the
decoupled objective of AReaL (arXiv:2505.24298): nothing is left out on the first update, and no
completion or token has more than `cap` times its weight. "sequence" is biased by the truncation
alone; it shrinks what became much likelier. "token" also takes prefixes as the sampler drew them,
rather than as pi would: the bias of PPO's and GRPO's token ratios, which does not vanish with cap,
in exchange for a variance that does not grow with the length.

Rows of the policy's own weights keep the ratio of exactly 1 with None; the two weights correct
rounding and cut distributions in them, too.
"""

from __future__ import annotations

import torch
from rloo_kernels.loss.packed import segment_sum
from torch import Tensor


def importance_ratios(
    trainer: Tensor, sampler: Tensor, cu_seqlens: Tensor, level: str
) -> Tensor:  # (N,), (N,), (R + 1,) -> (N,) or (R,), fp64
    """exp(trainer_logp_t - sampler_logp_t) per "token"; per "sequence", exp of the sum over t.

    Before the cap.
    """
    log_ratio = trainer.double() - sampler.double()
    return (log_ratio if level == "token" else segment_sum(log_ratio, cu_seqlens)).exp()


def weighted_advantages(
    advantages: Tensor,  # (R,), or (N,) per token
    old_logps: Tensor,  # (N,) of the trainer, at the weights that sampled
    sampler_logps: Tensor,  # (N,)
    lengths: Tensor,  # (R,) tokens of each row
    *,
    level: str,
    cap: float,
    advantages_per_token: bool,
) -> Tensor:
    """w_i A_i, or per token w_it A_i: for w >= 0, the objective of w A is w times that of A.

    With level "token", or advantages per token, the result is (N,): then ratio and clip of the
    loss are per token too, and the first update's gradient is - sum_it w_it A_i dlogp_it / B
    exactly. With level "sequence" and one advantage per row it is (R,).
    """
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    weights = importance_ratios(old_logps, sampler_logps, cu_seqlens, level)
    weights = weights.clamp(max=cap).to(advantages)
    if level == "token" and not advantages_per_token:
        advantages = advantages.repeat_interleave(lengths)
    if level == "sequence" and advantages_per_token:
        weights = weights.repeat_interleave(lengths)
    return weights * advantages
