"""The fields that say which prompts, and which of their groups, a run trains on."""

from __future__ import annotations

from dataclasses import dataclass

from .documented import documented as _field


@dataclass
class WhichPrompts:
    """See docs/which-prompts.md."""

    soft_punish_cache: int | None = _field(
        None,
        "L_cache of DAPO's soft overlong punishment: over the last so many tokens before "
        "max_completion_length, 0 to -1 are added to the reward of a completion.",
    )
    dynamic_sampling: bool = _field(
        False,
        "Replace prompts whose completions all got the same score, until the batch is full of "
        "groups that teach (DAPO, arXiv:2503.14476).",
    )
    max_sampling_rounds: int = _field(
        20,
        "dynamic_sampling: the most times that prompts are sampled for one batch, each time at "
        "most as many as it has; then it is trained as it is.",
    )
    rollout_filter: str | None = _field(
        None,
        "dynamic_sampling: a function that says of a group whether it may be trained on, as "
        "package.module:function or file.py:function.",
    )
    curriculum: float | None = _field(
        None,
        "Chance that a prompt comes in an epoch after its newest group taught nothing; such as "
        "0.25. Default: every prompt comes in every epoch.",
    )
