"""Rewards and per-token log-probs -> KL, shaped reward, leave-one-out advantage, ratio, clip, loss.

    KL_i  = sum_t (logp_it - ref_it)                                   k1 estimate, no gradient
    R_i   = score_i - beta KL_i                                        NaN: unscorable
    A_i   = R_i - mean over scorable j != i of the group of R_j        (arXiv:2402.14740)
    rho_i = exp(sum_t logp_it - sum_t old_it)                          a sum over t, not a mean
    loss  = - sum_i min(rho_i A_i, clip(rho_i, 1 - eps_low, 1 + eps_high) A_i) / denominator

Letters: R rows (completions), N completion tokens of all rows together, K rows per group. Row r
owns tokens `cu_seqlens[r]:cu_seqlens[r + 1]` of every packed (N,) tensor. Everything is fp32 (fp64
in, fp64 out).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def segment_ids(cu_seqlens: Tensor) -> Tensor:  # (R + 1,) -> (N,)
    """Row number of every packed token."""
    lengths = cu_seqlens.diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:  # (N,), (R + 1,) -> (R,)
    """sum_t values_it of every row; 0 for a row without tokens."""
    out = values.new_zeros(len(cu_seqlens) - 1)
    return out.index_add(0, segment_ids(cu_seqlens), values)


def segment_exclusive_cumsum(
    values: Tensor, cu_seqlens: Tensor
) -> Tensor:  # (N,), (R + 1,) -> (N,)
    """sum_{s < t} values_is: what a row has accumulated before token t.

    Summed row by row, so that a row's result does not depend on the rows packed before it.
    """
    parts = [v.cumsum(0) - v for v in values.split(cu_seqlens.diff().tolist())]
    return torch.cat(parts) if parts else values


def leave_one_out(rewards: Tensor) -> Tensor:  # (P, K) -> (P, K)
    """A_i = R_i - mean over scorable j != i of R_j  (arXiv:2402.14740); NaN rewards are unscorable.

    Unscorable rows, and the only scorable row of a group, get advantage 0: there is nothing to
    compare with. Raises ValueError if K < 2.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            "leave-one-out needs rewards of shape (P, K) with K >= 2 samples per prompt, "
            f"got {tuple(rewards.shape)}."
        )
    scorable = ~rewards.isnan()
    others = scorable.sum(1, keepdim=True) - 1
    total = rewards.nansum(1, keepdim=True)
    baseline = (total - rewards) / others.clamp(min=1)
    return torch.where(scorable & (others > 0), rewards - baseline, 0.0)


def comparable_rows(rewards: Tensor, num_generations: int) -> Tensor:  # (P K,) -> (P K,) bool
    """Scorable rows whose group has another scorable row; all others get advantage 0."""
    scorable = ~rewards.view(-1, num_generations).isnan()
    return (scorable & (scorable.sum(1, keepdim=True) > 1)).view(-1)


def nan_moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, unbiased std) over the entries that are not NaN; std is 0 for fewer than two."""
    kept = values[~values.isnan()]
    if kept.numel() == 0:
        nan = values.new_tensor(float("nan"))
        return nan, nan
    std = kept.std() if kept.numel() > 1 else kept.new_zeros(())
    return kept.mean(), std


def whiten(values: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) + mean, over entries that are not NaN: the mean is kept."""
    mean, std = nan_moments(values)
    return (values - mean) * torch.rsqrt(std * std + 1e-8) + mean


def rloo_advantages(
    rewards: Tensor, num_generations: int, *, normalize: bool = False, whiten_rewards: bool = False
) -> Tensor:
    """Leave-one-out advantages of prompt-major rewards: rows i K .. (i + 1) K are prompt i's K
    samples.

    Shapes: rewards (P K,) fp32, NaN where unscorable; returns (P K,), 0 where there is nothing to
    compare with. `whiten_rewards`: rewards are first scaled to unit variance over all rows.
    `normalize`: the advantages of the scorable rows become (A - mean) / (std + 1e-4), mean and
    unbiased std over all those rows. Raises ValueError if the number of rows is no multiple of
    `num_generations`, or that is < 2.
    """
    return scaled_advantages(
        rewards, num_generations, normalize=normalize, whiten_rewards=whiten_rewards
    )[0]


def scaled_advantages(
    rewards: Tensor, num_generations: int, *, normalize: bool, whiten_rewards: bool
) -> tuple[Tensor, Tensor]:
    """(`rloo_advantages`, the factor () that `whiten_rewards` and `normalize` put on rewards)."""
    if num_generations < 2 or rewards.ndim != 1 or len(rewards) % num_generations:
        raise ValueError(
            "rewards must hold whole groups of num_generations >= 2 samples, "
            f"got shape {tuple(rewards.shape)} and num_generations = {num_generations}."
        )
    scale = rewards.new_ones(())
    if whiten_rewards:
        scale = torch.rsqrt(nan_moments(rewards)[1] ** 2 + 1e-8)
        rewards = whiten(rewards)
    advantages = leave_one_out(rewards.view(-1, num_generations)).view(-1)
    if normalize:
        compared = comparable_rows(rewards, num_generations)
        mean, std = nan_moments(torch.where(compared, advantages, float("nan")))
        advantages = torch.where(compared, (advantages - mean) / (std + 1e-4), 0.0)
        scale = scale / (std + 1e-4)
    return advantages, scale


def token_level_advantages(
    advantages: Tensor,
    kl_per_token: Tensor,
    cu_seqlens: Tensor,
    beta: float,
    compared: Tensor | None = None,
) -> Tensor:  # (R,), (N,), (R + 1,), (R,) -> (N,)
    """A_it = A_i + beta sum_{s < t} (logp_is - ref_is): the KL penalty as reward-to-go.

    The reward-to-go of token t is score_i - beta sum_{s >= t} KL_is (REINFORCE++,
    arXiv:2501.03262, eq. 1); the baseline is the sequence's leave-one-out mean. A penalty already
    paid before t drops out of A_it. Where rewards were scaled (`scaled_advantages`), give beta
    times the factor. Rows where `compared` is False (see `comparable_rows`) get 0.
    """
    owner = segment_ids(cu_seqlens)
    per_token = advantages[owner] + beta * segment_exclusive_cumsum(kl_per_token, cu_seqlens)
    return per_token if compared is None else torch.where(compared[owner], per_token, 0.0)


class Objective(NamedTuple):
    """What `rloo_objective` returns; per-row tensors carry no gradient."""

    loss: Tensor  # () differentiable: minus the clipped objective, summed over rows, / denominator
    per_row_loss: Tensor  # (R,) before the division
    log_ratio: Tensor  # (R,) sum_t (logp_it - old_it)
    token_ratio_sum: Tensor  # (R,) sum_t exp(logp_it - old_it)
    clipped_low: Tensor  # (R,) share of the row's ratios below 1 - eps_low with A < 0
    clipped_high: Tensor  # (R,) share of the row's ratios above 1 + eps_high with A > 0


def rloo_objective(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    epsilon_low: float,
    epsilon_high: float,
    denominator: float,
    token_level: bool = False,
) -> Objective:
    """The clipped RLOO loss over packed completions; `denominator` = completions of the step on
    all ranks.

    Shapes: logps, old_logps (N,); cu_seqlens (R + 1,). Sequence level: advantages (R,), one ratio
    per row, rho_i = exp(sum_t logp_it - old_it). Token level: advantages (N,), one ratio per
    token, and the loss sums over the row's tokens (so that at beta = 0 and ratio 1 both levels
    have the same gradient). Only `logps` gets a gradient.
    """
    old_logps, advantages = old_logps.detach(), advantages.detach()
    log_ratio_t = logps - old_logps
    log_ratio = segment_sum(log_ratio_t, cu_seqlens)
    exponent = log_ratio_t if token_level else log_ratio
    with torch.no_grad():
        ratio = torch.exp(exponent)
        low = (ratio < 1 - epsilon_low) & (advantages < 0)
        high = (ratio > 1 + epsilon_high) & (advantages > 0)
        # no gradient there, whatever the ratio: an inf must not meet a 0, which makes nan
        still = low | high | (advantages == 0)
        bound = ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * advantages
    moving = torch.exp(torch.where(still, 0.0, exponent)) * advantages
    objective = torch.where(still, bound, moving)
    with torch.no_grad():
        low, high = low.to(logps.dtype), high.to(logps.dtype)
        if token_level:
            count = cu_seqlens.diff().clamp(min=1)
            low, high = (segment_sum(x, cu_seqlens) / count for x in (low, high))
        token_ratio_sum = segment_sum(torch.exp(log_ratio_t), cu_seqlens)
    per_row = -(segment_sum(objective, cu_seqlens) if token_level else objective)
    return Objective(
        loss=per_row.sum() / denominator,
        per_row_loss=per_row.detach(),
        log_ratio=log_ratio.detach(),
        token_ratio_sum=token_ratio_sum,
        clipped_low=low,
        clipped_high=high,
    )
