"""Rewards -> advantages: leave-one-out (RLOO), group mean and std (GRPO), scaling, reward-to-go.

    A_i = R_i - mean over scorable j != i of the group of R_j           (RLOO, arXiv:2402.14740)
    A_i = (R_i - mean of the group) / (std of the group + 1e-4)         (GRPO, arXiv:2402.03300)
    A_i = R_i - mean of the group                                   (Dr. GRPO, arXiv:2503.20783)

Letters: P prompts, K samples each, R = P K rows (completions), N completion tokens of all rows
together. Row r owns tokens `cu_seqlens[r]:cu_seqlens[r + 1]` of every packed (N,) tensor. NaN marks
a reward that could not be scored. Nothing here waits for the device.
"""

# pyright: strict

from __future__ import annotations

import torch
from torch import Tensor

from .packed import segment_exclusive_cumsum, segment_ids


def _check_groups(rewards: Tensor, what: str) -> None:
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"{what} rewards of shape (P, K) with K >= 2 samples per prompt, "
            f"got {tuple(rewards.shape)}."
        )


def leave_one_out(rewards: Tensor) -> Tensor:  # (P, K) -> (P, K)
    """A_i = R_i - mean over scorable j != i of R_j  (arXiv:2402.14740); NaN rewards are unscorable.

    Unscorable rows, and the only scorable row of a group, get advantage 0: there is nothing to
    compare with. Raises ValueError if K < 2.
    """
    _check_groups(rewards, "leave-one-out needs")
    scorable = ~rewards.isnan()
    others = scorable.sum(1, keepdim=True) - 1
    total = rewards.nansum(1, keepdim=True)
    baseline = (total - rewards) / others.clamp(min=1)
    return torch.where(scorable & (others > 0), rewards - baseline, 0.0)


def group_centered(rewards: Tensor) -> Tensor:  # (P, K) -> (P, K)
    """A_i = R_i - mean of the group  (Dr. GRPO, arXiv:2503.20783); NaN: unscorable.

    The mean is over the scorable rows of the group; unscorable rows, and the only scorable row of a
    group, get advantage 0. Raises ValueError if K < 2.
    """
    _check_groups(rewards, "advantages of a group need")
    scorable = ~rewards.isnan()
    count = scorable.sum(1, keepdim=True)
    distance = rewards - rewards.nansum(1, keepdim=True) / count.clamp(min=1)
    return torch.where(scorable & (count > 1), distance, 0.0)


def group_normalized(rewards: Tensor) -> Tensor:  # (P, K) -> (P, K)
    """A_i = (R_i - mean) / (std + 1e-4) of the group  (GRPO, arXiv:2402.03300); NaN: unscorable.

    The unbiased std is over the scorable rows of the group; for the rest see `group_centered`.
    """
    distance = group_centered(rewards)  # 0 for the unscorable
    count = (~rewards.isnan()).sum(1, keepdim=True)
    std = (distance.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return distance / (std + 1e-4)


def comparable_rows(rewards: Tensor, num_generations: int) -> Tensor:  # (P K,) -> (P K,) bool
    """Scorable rows whose group has another scorable row; all others get advantage 0."""
    scorable = ~rewards.view(-1, num_generations).isnan()
    return (scorable & (scorable.sum(1, keepdim=True) > 1)).view(-1)


def nan_moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, unbiased std) over the entries that are not NaN: NaN where there is none, std 0 for
    fewer than two."""
    count = (~values.isnan()).sum()
    mean = values.nansum() / count  # 0 / 0: nan
    variance = (values - mean).square().nansum() / (count - 1).clamp(min=1)
    return mean, torch.where(count > 0, variance.sqrt(), mean)


def whiten(values: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) + mean, over entries that are not NaN: the mean is kept."""
    mean, std = nan_moments(values)
    return (values - mean) * torch.rsqrt(std * std + 1e-8) + mean


BY_GROUP = {"rloo": leave_one_out, "grpo": group_normalized, "dr_grpo": group_centered}


def rloo_advantages(
    rewards: Tensor,
    num_generations: int,
    *,
    normalize: bool = False,
    whiten_rewards: bool = False,
    advantage: str = "rloo",
) -> Tensor:
    """Advantages of prompt-major rewards: rows i K .. (i + 1) K are prompt i's K samples.

    Shapes: rewards (P K,) fp32, NaN where unscorable; returns (P K,), 0 where there is nothing to
    compare with. `advantage`: a name of BY_GROUP.
    `whiten_rewards`: rewards are first scaled to unit variance over all rows. `normalize`: the
    advantages of the scorable rows become (A - mean) / (std + 1e-4), mean and unbiased std over
    all those rows. Raises ValueError if the number of rows is no multiple of `num_generations`, or
    that is < 2.
    """
    return scaled_advantages(
        rewards,
        num_generations,
        normalize=normalize,
        whiten_rewards=whiten_rewards,
        advantage=advantage,
    )[0]


def scaled_advantages(
    rewards: Tensor,
    num_generations: int,
    *,
    normalize: bool,
    whiten_rewards: bool,
    advantage: str = "rloo",
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
    advantages = BY_GROUP[advantage](rewards.view(-1, num_generations)).view(-1)
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
    beta: float | Tensor,
    compared: Tensor | None = None,
) -> Tensor:  # (R,), (N,), (R + 1,), (R,) -> (N,)
    """A_it = A_i + beta sum_{s < t} (logp_is - ref_is): the KL penalty as reward-to-go.

    The reward-to-go of token t is reward_i - beta sum_{s >= t} KL_is (REINFORCE++,
    arXiv:2501.03262, eq. 1); the baseline is the sequence's leave-one-out mean. A penalty already
    paid before t drops out of A_it. Where rewards were scaled (`scaled_advantages`), give beta
    times the factor. Rows where `compared` is False (see `comparable_rows`) get 0.
    """
    owner = segment_ids(cu_seqlens, len(kl_per_token))
    per_token = advantages[owner] + beta * segment_exclusive_cumsum(kl_per_token, cu_seqlens)
    return per_token if compared is None else torch.where(compared[owner], per_token, 0.0)
