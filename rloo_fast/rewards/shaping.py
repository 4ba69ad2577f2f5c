"""Weighted rewards -> scores: penalties of length, normalisation, clip, before any KL penalty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class SoftPunish(NamedTuple):
    """DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13), added to the reward:

    0                                    |y| <= L_max - L_cache
    ((L_max - L_cache) - |y|) / L_cache  L_max - L_cache < |y| <= L_max
    -1                                   L_max < |y|
    """

    longest: int  # L_max, tokens of the longest completion
    cache: int  # L_cache, tokens over which the punishment grows from 0 to -1

    def of(self, length: Tensor) -> Tensor:
        return ((self.longest - self.cache - length) / self.cache).clamp(-1, 0)


def shape_scores(
    rewards: Tensor,
    truncated: Tensor,
    length: Tensor | None = None,
    *,
    missing_eos_penalty: float | None = None,
    soft_punish: SoftPunish | None = None,
    normalize: bool = False,
    clip_range: list[float] | None = None,
) -> Tensor:
    """(B,) weighted rewards of the generation batch -> scores; NaN (unscorable) stays NaN.

    In this order: minus the penalty where `truncated` (cut before it ended); plus the punishment
    of its `length` in tokens; (r - mean) / (std + 1e-8), unbiased std over the scorable rows; clip
    to clip_range = (min, max).
    """
    if missing_eos_penalty is not None:
        rewards = rewards - missing_eos_penalty * truncated.to(rewards.dtype)
    if soft_punish is not None:
        assert length is not None
        rewards = rewards + soft_punish.of(length).to(rewards.dtype)
    if normalize:
        kept = rewards[~rewards.isnan()]
        std = kept.std() if kept.numel() > 1 else kept.new_zeros(())
        rewards = (rewards - kept.mean()) / (std + 1e-8)
    if clip_range is not None:
        rewards = rewards.clamp(*clip_range)
    return rewards


@dataclass(frozen=True)
class ScoreSettings:
    """What becomes of the weighted reward before the loss sees it (see `shape_scores`)."""

    missing_eos_penalty: float | None = None
    soft_punish: SoftPunish | None = None
    normalize: bool = False
    clip_range: list[float] | None = None

    def scores(self, reward: Tensor, truncated: Tensor, length: Tensor) -> Tensor:
        """Of all completions of a generation batch, (B,) each."""
        return shape_scores(
            reward.float(),
            truncated,
            length,
            missing_eos_penalty=self.missing_eos_penalty,
            soft_punish=self.soft_punish,
            normalize=self.normalize,
            clip_range=self.clip_range,
        )
