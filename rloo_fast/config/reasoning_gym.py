"""A reasoning-gym task by its name and configuration, both checked."""

# reasoning-gym has no stubs
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import dataclasses
import difflib
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

MIXTURE = "composite"  # made of other tasks' datasets: those are loaded one by one here


def make_task(task: str, size: int, seed: int, task_config: dict[str, Any]) -> ProceduralDataset:
    """reasoning-gym's dataset of a task: item i is made from seed + i.

    Raises ValueError for an unknown task, an unknown field or a bad value of its configuration.
    """
    gym: Any = import_module("reasoning_gym")  # an untyped package
    datasets: dict[str, tuple[type, type]] = import_module("reasoning_gym.factory").DATASETS

    known = sorted(datasets.keys() - {MIXTURE})
    if task not in known:
        near = difflib.get_close_matches(task, known, n=3, cutoff=0.4)
        meant = f"Did you mean {' or '.join(map(repr, near))}?" if near else "It has " + str(known)
        raise ValueError(f"reasoning-gym has no task {task!r}. {meant}")
    fields = {field.name for field in dataclasses.fields(datasets[task][1])} - {"seed", "size"}
    if unknown := sorted(task_config.keys() - fields):
        near = [c for key in unknown for c in difflib.get_close_matches(key, fields, n=1)]
        meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"task {task!r} has no configuration {', '.join(map(repr, unknown))}.{meant} "
            f"It has {', '.join(sorted(fields)) or 'none'}."
        )
    try:
        return gym.create_dataset(task, seed=seed, size=size, **task_config)
    except (AssertionError, ValueError, TypeError) as error:  # its configs check with assert
        raise ValueError(f"task {task!r} refuses {task_config}: {error}") from error
