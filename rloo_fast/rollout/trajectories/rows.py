"""Trajectories -> the rows that train them: prompts that a group has in common, and strands behind.

Prompts of a group may differ, as an environment puts its own text behind each, and a template may
write what opens a turn anew. What all strands of a group begin with is the prompt of its rows then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

from ...records import Trajectory


class TrajectoryRows(NamedTuple):
    """Fields of GenerationBatch, one entry per row."""

    prompt_ids: list[list[int]]
    strand_ids: list[list[list[int]]]
    counted: list[list[list[int]]]


def trajectory_rows(
    trajectories: Sequence[Trajectory],
    groups: Sequence[int],
    prompt_ids: Sequence[list[int]],
    is_masked: Sequence[bool],
    everyone: Callable[[Any], list[Any]] = lambda value: [value],
) -> TrajectoryRows:
    """`groups`: number of each row's prompt, which other processes may have rows of too;
    `is_masked`: rows of which no token counts. `everyone`: see TrajectorySampler.

    Prompts of a group that begin with different tokens, as a rollout_func may write them, share
    nothing. Raises ValueError, on every process, where a strand does not begin as its prompt does.
    """
    keys = [(group, ids[0]) for group, ids in zip(groups, prompt_ids, strict=True)]
    here: dict[tuple[int, int], list[int]] = {}
    for one, key, prompt in zip(trajectories, keys, prompt_ids, strict=True):
        for ids in [prompt, *(strand.ids for strand in one.strands)]:
            here[key] = _shared(here.get(key, prompt), ids)
    common: dict[tuple[int, int], list[int]] = {}  # of everyone, so that all raise what one does
    for key, ids in chain.from_iterable(found.items() for found in everyone(here)):
        common[key] = _shared(common[key], ids) if key in common else ids
    if any(not ids for ids in common.values()):
        raise ValueError(
            "the parts of a trajectory begin with different tokens, so that they have nothing in "
            "common: a chat template must write the same for the start of each."
        )
    cuts = [len(common[key]) for key in keys]
    return TrajectoryRows(
        prompt_ids=[common[key] for key in keys],
        strand_ids=[
            [strand.ids[cut:] for strand in one.strands]
            for one, cut in zip(trajectories, cuts, strict=True)
        ],
        counted=[
            [[] if masked else [place - cut for place in s.counted] for s in one.strands]
            for one, cut, masked in zip(trajectories, cuts, is_masked, strict=True)
        ],
    )


def completion_of(trajectory: Trajectory, prompt_ids: list[int]) -> list[int]:
    """The ids of the last strand behind what it has of the prompt."""
    ids = trajectory.strands[-1].ids
    return ids[len(_shared(prompt_ids, ids)) :]


def _shared(one: list[int], other: list[int]) -> list[int]:
    """What both begin with."""
    if other[: len(one)] == one:
        return one
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((place for place, (a, b) in pairs if a != b), len(other))]
