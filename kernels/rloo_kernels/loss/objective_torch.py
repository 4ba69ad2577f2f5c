"""Log-probs, reference log-probs and rewards of completions -> KL, shaped reward, advantage, ratio,
clip, loss and its per-token coefficients: the specification.

    KL_i  = sum_t (logp_it - ref_it)                                   k1 estimate, no gradient
    R_i   = reward_i - beta KL_i                                       NaN: unscorable
    A_i   = R_i - mean over scorable j != i of the group of R_j        (arXiv:2402.14740)
    rho_i = exp(sum_t logp_it - sum_t old_it)                          a sum over t, not a mean
    loss  = - sum_i min(rho_i A_i, clip(rho_i, 1 - eps_low, 1 + eps_high) A_i) / denominator
    c_it  = dloss / dlogp_it = - rho_i A_i / denominator, 0 where clipped

Per token, with level="token" (PPO, GRPO): rho_it and A_it in place of rho_i and A_i, summed over t.
`LossOptions` lists the other choices.

Letters: P prompts, K samples each, R = P K rows (completions), N completion tokens of all rows
together. Row r owns tokens `cu_seqlens[r]:cu_seqlens[r + 1]` of every packed (N,) tensor. All in
fp32 (fp64 in, fp64 out).
"""

# pyright: strict

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .advantages import comparable_rows, scaled_advantages, token_level_advantages
from .packed import segment_ids, segment_sum
from .types import TABLE_FIELDS, LossInputs, LossOptions


def objective_torch(
    logps: Tensor,
    cu_seqlens: Tensor,
    inputs: LossInputs,
    entropy: Tensor | None,
    options: LossOptions,
) -> tuple[Tensor, Tensor]:
    """(coefficients (N,), table (len(TABLE_FIELDS), R)); options.denominator is set."""
    assert options.denominator is not None
    owner = segment_ids(cu_seqlens, len(logps))
    valid = torch.ones_like(logps, dtype=torch.bool) if inputs.mask is None else inputs.mask

    def counted(x: Tensor | None) -> Tensor:
        return torch.zeros_like(logps) if x is None else torch.where(valid, x, 0.0)

    def row_sum(x: Tensor) -> Tensor:
        return segment_sum(x, cu_seqlens)

    kl = counted(None if inputs.ref_logps is None else logps - inputs.ref_logps)
    log_ratio = counted(_log_ratio(logps, inputs.old_logps))
    row_kl, row_log_ratio = row_sum(kl), row_sum(log_ratio)
    num_tokens = row_sum(valid.to(logps.dtype))
    advantages = resolve_advantages(inputs, kl, row_kl, cu_seqlens, options)
    per_row, per_token = advantages.per_row, advantages.per_token

    if options.level == "token":
        a = per_row[owner] if per_token is None else per_token
        loss, slope, low, high = _clip(log_ratio, a, options)
        if options.kl_in_loss:
            k3, k3_slope = _k3_penalty(kl, log_ratio, options)
            loss, slope = loss + k3, slope + k3_slope
        share = 1 / num_tokens.clamp(min=1)
        weight = share if options.token_mean else torch.ones_like(share)
        loss, low, high = (row_sum(counted(x)) for x in (loss, low, high))
        loss, low, high = loss * weight, low * share, high * share
        slope = slope * weight[owner]
    else:
        loss, slope, low, high = _clip(row_log_ratio, per_row, options)
        slope = slope[owner]
    if per_token is not None and inputs.rewards is None:  # token_advantages: nothing else is known
        per_row = row_sum(counted(per_token))
    columns = {
        "loss_per_row": loss,
        "advantages": per_row,
        "kl": row_kl,
        "shaped_rewards": advantages.shaped_rewards,
        "logp_sum": row_sum(counted(logps)),
        "log_ratio": row_log_ratio,
        "token_ratio_sum": row_sum(counted(torch.exp(log_ratio))),
        "clipped_low": low,
        "clipped_high": high,
        "entropy_sum": row_sum(counted(entropy)),
        "num_tokens": num_tokens,
    }
    table = torch.stack([columns[name] for name in TABLE_FIELDS])
    return counted(slope) / options.denominator, table


def _log_ratio(logps: Tensor, old_logps: Tensor | None) -> Tensor | None:
    """logp - old; 0 where old is NaN: the token's own log-prob is the old one."""
    if old_logps is None:
        return None
    return torch.where(old_logps.isnan(), 0.0, logps - old_logps)


class Advantages(NamedTuple):
    """Advantages of R rows, and of their N tokens where these differ within a row."""

    per_row: Tensor  # (R,) 0 where token_advantages were given
    per_token: Tensor | None  # (N,)
    shaped_rewards: Tensor  # (R,) reward - beta KL; NaN where advantages were given


def resolve_advantages(
    inputs: LossInputs, kl: Tensor, row_kl: Tensor, cu_seqlens: Tensor, options: LossOptions
) -> Advantages:
    """Advantages as given, or made from the rewards and the KL (N,), summed over rows (R,)."""
    if inputs.rewards is None:
        none = torch.full_like(row_kl, float("nan"))
        if inputs.advantages is not None:
            given = inputs.advantages.to(row_kl.dtype)
            return Advantages(torch.where(given.isnan(), 0.0, given), None, none)
        return Advantages(torch.zeros_like(row_kl), inputs.token_advantages, none)
    shaped = inputs.rewards - (0.0 if options.kl_in_loss else options.beta) * row_kl
    per_row, scale = scaled_advantages(
        shaped,
        options.num_generations,
        normalize=options.normalize,
        whiten_rewards=False,
        advantage=options.advantage,
    )
    if options.kl != "reward_to_go":
        return Advantages(per_row, None, shaped)
    beta = options.beta * scale  # the KL is scaled as the rewards it is subtracted from
    compared = comparable_rows(shaped, options.num_generations)
    per_token = token_level_advantages(per_row, kl, cu_seqlens, beta, compared)
    return Advantages(per_row, per_token, shaped)


def _clip(
    log_ratio: Tensor, a: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-min(rho a, clip(rho) a), its derivative by log rho, and where it is clipped: 1 or 0 for
    below 1 - eps_low, and for above 1 + eps_high."""
    ratio = torch.exp(log_ratio)
    low = (ratio < 1 - options.epsilon_low) & (a < 0)
    high = (ratio > 1 + options.high) & (a > 0)
    # no gradient there, whatever the ratio: an inf must not meet a 0, which makes nan
    still = low | high | (a == 0)
    moving = torch.exp(torch.where(still, 0.0, log_ratio)) * a
    bound = ratio.clamp(1 - options.epsilon_low, 1 + options.high) * a
    loss = -torch.where(still, torch.where(a == 0, 0.0, bound), moving)
    slope = -torch.where(still, 0.0, moving)
    return loss, slope, low.to(ratio.dtype), high.to(ratio.dtype)


def _k3_penalty(kl: Tensor, log_ratio: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """beta k3, or beta rho k3 with kl="corrected_loss", and its derivative by logp; per token."""
    e = torch.expm1(-kl)
    if options.kl == "corrected_loss":  # d(rho k3) = rho (k3 + dk3) = rho (k3 - e) = rho kl
        factor, slope = options.beta * torch.exp(log_ratio), kl
    else:
        factor, slope = options.beta * 1.0, -e
    return factor * (e + kl), factor * slope
