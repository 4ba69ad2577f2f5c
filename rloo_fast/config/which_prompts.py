"""The fields that say which prompts, and which of their groups, a run trains on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .code_files import load_function
from .documented import documented as _field

if TYPE_CHECKING:
    from .fields import RLOOFields


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


def refuse_which_prompts(args: RLOOFields) -> None:
    """Raise ValueError for options of these that contradict each other, or mean nothing."""
    cache, longest = args.soft_punish_cache, args.max_completion_length
    if cache is not None and cache > longest:
        raise ValueError(
            f"soft_punish_cache ({cache}) is the last part of max_completion_length ({longest}), "
            "over which the punishment grows: give fewer tokens than that."
        )
    if args.rollout_filter is not None:
        load_function(args.rollout_filter, "rollout_filter")
        if not args.dynamic_sampling:
            raise ValueError(
                f"rollout_filter={args.rollout_filter!r} says which groups are replaced by others: "
                "set dynamic_sampling=True as well."
            )
    default = WhichPrompts.max_sampling_rounds
    if args.max_sampling_rounds != default and not args.dynamic_sampling:
        raise ValueError(
            f"max_sampling_rounds={args.max_sampling_rounds} has no effect without "
            "dynamic_sampling=True: set that as well, or leave it out."
        )
    if args.max_staleness:
        for name in ("dynamic_sampling", "curriculum"):
            if getattr(args, name):
                raise ValueError(
                    f"{name} with max_staleness={args.max_staleness} is not in this version: leave "
                    "one of the two out."
                )
