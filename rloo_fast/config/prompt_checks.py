"""What contradicts each other of the options that choose prompts and groups: refused."""

from __future__ import annotations

from .code_files import load_function
from .fields import RLOOFields
from .which_prompts import WhichPrompts


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
