"""Weighted rewards -> scores: missing-EOS penalty, normalisation, clip, before any KL penalty."""

from __future__ import annotations

from torch import Tensor


def shape_scores(
    rewards: Tensor,
    truncated: Tensor,
    *,
    missing_eos_penalty: float | None = None,
    normalize: bool = False,
    clip_range: list[float] | None = None,
) -> Tensor:
    """(B,) weighted rewards of the generation batch -> scores; NaN (unscorable) stays NaN.

    In this order: minus the penalty where `truncated` (cut before it ended); (r - mean) /
    (std + 1e-8), unbiased std over the scorable rows; clip to clip_range = (min, max).
    """
    if missing_eos_penalty is not None:
        rewards = rewards - missing_eos_penalty * truncated.to(rewards.dtype)
    if normalize:
        kept = rewards[~rewards.isnan()]
        std = kept.std() if kept.numel() > 1 else kept.new_zeros(())
        rewards = (rewards - kept.mean()) / (std + 1e-8)
    if clip_range is not None:
        rewards = rewards.clamp(*clip_range)
    return rewards
