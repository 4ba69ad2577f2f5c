"""What there is to show and to log of a rollout, gathered from all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from ..data.images import without_images
from ..distributed.collectives import gather_objects
from ..records import CompletionTexts, Count, Prompt


def gather_texts(
    accelerator: Accelerator,
    reward_names: Sequence[str],
    rows: Sequence[Prompt],
    completions: list[Any],
    rewards: Tensor,  # (R, F)
    extra: Mapping[str, list[Any]],
    images: list[list[Any]] | None = None,
) -> CompletionTexts:
    """Of this process' rows -> of those of all; `extra`: what reward functions gave to log_extra,
    left out where it is not one value per row."""
    mine = {
        "prompts": [without_images(row.text) for row in rows],
        "completions": completions,
        "images": images or [],
        "rewards": rewards.tolist(),
        "extra": {name: values for name, values in extra.items() if len(values) == len(rows)},
    }
    everyone = gather_objects(accelerator, mine)
    per_row = [row for one in everyone for row in one["rewards"]]
    names = sorted({name for one in everyone for name in one["extra"]})
    return CompletionTexts(
        prompts=[x for one in everyone for x in one["prompts"]],
        completions=[x for one in everyone for x in one["completions"]],
        rewards={name: [row[i] for row in per_row] for i, name in enumerate(reward_names)},
        extra={
            name: [
                value
                for one in everyone
                for value in one["extra"].get(name, [None] * len(one["prompts"]))
            ]
            for name in names
        },
        images=None if images is None else [x for one in everyone for x in one["images"]],
    )


def texts_of(texts: CompletionTexts, rows: slice) -> CompletionTexts:
    """Those of some rows."""
    return CompletionTexts(
        prompts=texts.prompts[rows],
        completions=texts.completions[rows],
        rewards={name: values[rows] for name, values in texts.rewards.items()},
        extra={name: values[rows] for name, values in texts.extra.items()},
        images=None if texts.images is None else texts.images[rows],
    )


def joined_texts(parts: Sequence[CompletionTexts]) -> CompletionTexts:
    """One part's rows after the other's; what a part has no extra value for is None."""
    names = sorted({name for part in parts for name in part.extra})
    images = [part.images for part in parts if part.images is not None]
    return CompletionTexts(
        prompts=[x for part in parts for x in part.prompts],
        completions=[x for part in parts for x in part.completions],
        rewards={
            name: [x for part in parts for x in part.rewards[name]] for name in parts[0].rewards
        },
        extra={
            name: [x for part in parts for x in part.extra.get(name, [None] * len(part.prompts))]
            for name in names
        },
        images=[x for some in images for x in some] if len(images) == len(parts) else None,
    )


def mean_logged(
    accelerator: Accelerator, mine: Sequence[Mapping[str, list[float]]]
) -> dict[str, float]:
    """Of what reward functions gave to log_metric, call after call, over all processes; counts are
    summed."""
    together: dict[str, list[float]] = {}
    for logged in mine:
        for name, values in logged.items():
            together.setdefault(name, []).extend(values)
    everyone = gather_objects(accelerator, together)
    out: dict[str, float] = {}
    for name in sorted({name for one in everyone for name in one}):
        values = [value for one in everyone for value in one.get(name, [])]
        is_count = any(isinstance(value, Count) for value in values)
        out[name] = sum(values) / (1 if is_count else len(values))
    return out
