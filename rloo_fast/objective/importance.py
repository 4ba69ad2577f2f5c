"""Sampler and trainer log-probs in, truncated importance weights out.

    token:      w_it = min(exp(old_it - sampler_it), cap)
    sequence:   w_i  = min(exp(sum_t (old_it - sampler_it)), cap)

Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".
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
