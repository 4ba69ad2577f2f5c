"""A configuration whose fields were set after it was made: what counts, what is new.

RLOOConfig works some values out of others. Where one of these is set later, before the trainer is
made or by `dataclasses.replace`, what follows from it must follow again, and what was given must
stay.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any, cast

from transformers.trainer_pt_utils import AcceleratorConfig

from .fields import OWN_PARTS, RLOOFields
from .names_2024 import RENAMED, Names2024

# (field, field that says the same): the one that was set last counts
SAME_THING: tuple[tuple[str, str], ...] = (
    *RENAMED.items(),
    ("token_level_kl", "loss"),
    ("num_mini_batches", "steps_per_generation"),
    ("num_mini_batches", "generation_batch_size"),
    ("generation_batch_size", "steps_per_generation"),
    ("total_episodes", "max_steps"),
    ("rollout_engine", "use_vllm"),
    ("rollout_engine", "vllm_mode"),
)
# field: the one that it is worked out of, where it was set after both were known
FOLLOWS = {"bf16": "fp16", "activation_checkpointing": "gradient_checkpointing"}
DEVICE = {"use_cpu", "deepspeed", "ddp_backend", "ddp_timeout"}  # transformers asks for it once
ONCE = ("per_device_train_batch_size", "fp16", "torch_compile", "torch_compile_mode")
LATE = {  # of RLOOConfig's own fields, those that are read when they are needed
    "gradient_checkpointing", "learning_rate", "logging_steps", "num_generations_eval",
    "num_sample_generations", "ref_model_mixup_alpha", "ref_model_sync_steps", "shuffle_dataset",
}  # fmt: skip


class Derived(int):
    """A number that was left out, and worked out of other fields: an int to everyone else.

    It tells such a number from one that was given, also in what a configuration is made of again:
    `dataclasses.replace`, `RLOOConfig(**config.to_dict())`.
    """


def given(number: int | None) -> int | None:
    """The number, or None where it was left out."""
    return None if isinstance(number, Derived) else number


def values_of(args: RLOOFields) -> dict[str, Any]:
    """Every field's value now, so that a later change is seen, also inside of a dict."""
    values = {f.name: getattr(args, f.name) for f in fields(args) if f.init}
    return {name: _copy(value) for name, value in values.items()}


def changed_since(args: RLOOFields, values: dict[str, Any]) -> set[str]:
    """The fields whose value is another one than in `values`, as `values_of` returned them."""
    return {name for name, value in values.items() if not _same(getattr(args, name), value)}


def prefer_the_changed(args: RLOOFields, changed: Iterable[str]) -> None:
    """Take back what contradicts the fields that were set last."""
    changed = set(changed)
    if isinstance(args.max_steps, Derived) or args.max_steps == -1:
        changed.discard("max_steps")  # nobody asked for a number of steps
    for one, other in SAME_THING:
        if (one in changed) != (other in changed):
            _reset(args, other if one in changed else one)
    for name, source in FOLLOWS.items():
        if source in changed and name not in changed and hasattr(args, name):
            _reset(args, name)
    if DEVICE & changed:
        vars(args).pop("_setup_devices", None)


class FixedFields:
    """The fields that are read once, when the trainer is made: a later change must not get lost.

    The others are transformers', which reads them when they are needed, or LATE.
    """

    def __init__(self, args: RLOOFields):
        parts = (*OWN_PARTS, Names2024)
        own = {*ONCE, *(name for part in parts for name in part.__annotations__)} - LATE
        self.args = args
        self.values = {name: value for name, value in values_of(args).items() if name in own}

    def check(self) -> None:
        """Raise ValueError if one was set since, or gradient_accumulation_steps in a run."""
        now = self.args.gradient_accumulation_steps
        if self.args.micro_steps_per_update != now and now != 1:
            raise ValueError(
                f"gradient_accumulation_steps was set to {now} during the run: set it before "
                "train(), as the steps of the run are planned by it."
            )
        if changed := sorted(changed_since(self.args, self.values)):
            name = changed[0]
            raise ValueError(
                f"{name} was {self.values[name]!r} when the trainer was made and is "
                f"{getattr(self.args, name)!r} now: set it before, or make another trainer."
            )


def _reset(args: RLOOFields, name: str) -> None:
    field = args.__dataclass_fields__[name]
    assert field.default is not MISSING, name
    setattr(args, name, field.default)


def _copy(value: Any) -> Any:
    """Containers anew, with the very objects in them: a copied object may not equal itself."""
    if isinstance(value, dict):
        items = cast(dict[Any, Any], value).items()
        return {key: _copy(item) for key, item in items}
    if isinstance(value, list):
        return [_copy(item) for item in cast(list[Any], value)]
    return copy.copy(value) if isinstance(value, AcceleratorConfig) else value


def _same(now: Any, before: Any) -> bool:
    try:
        same = now is before or bool(now == before)
    except Exception:  # arrays and tensors do not compare to one truth
        return False
    return same and isinstance(now, Derived) == isinstance(before, Derived)
