"""Values that were given under a name of TRL's 2024 trainer, written under the current one."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from .changes import given
from .fields import RLOOFields
from .names_2024 import RENAMED


def apply_names_2024(args: RLOOFields) -> None:
    """Write every 2024 value that was given under its current name.

    Raises ValueError where both names were given and disagree.
    """
    defaults = {f.name: f.default for f in fields(args)}
    for old, new in RENAMED.items():
        value, current = getattr(args, old), getattr(args, new)
        if value is None:
            continue
        if current not in (defaults[new], value):
            raise ValueError(
                f"{old}={value} and {new}={current} say the same thing twice: set {new}."
            )
        setattr(args, new, value)
    if args.num_mini_batches is not None:
        _mini_batches(args, args.num_mini_batches)
    if args.token_level_kl:
        _token_level_kl(args, defaults["loss"])


def _mini_batches(args: RLOOFields, num_mini_batches: int) -> None:
    steps = num_mini_batches * args.gradient_accumulation_steps
    if num_mini_batches < 1 or given(args.steps_per_generation) not in (None, steps):
        raise ValueError(
            f"num_mini_batches={num_mini_batches} means steps_per_generation={steps}, "
            f"but that is {args.steps_per_generation}: set steps_per_generation."
        )


def _token_level_kl(args: RLOOFields, default: Any) -> None:
    if args.loss not in (default, "reinforce_pp"):
        raise ValueError(
            f"token_level_kl=True means loss='reinforce_pp', but that is {args.loss!r}: set loss."
        )
    args.loss = "reinforce_pp"
