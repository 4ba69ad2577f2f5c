"""Prompts of a round that is sampled ahead, and what is there of their completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..records import Prompt
from ..rollout.ahead import Sampled

Found = list[list[Sampled | None]]  # completions of each group, None: not there


@dataclass
class Drawn:
    """The prompts of a round, by their numbers in the stream. `prompts`: None after a resume, or
    what a prompt raised, which is raised once the round is taken. `found`: of a checkpoint."""

    numbers: list[int]
    prompts: list[Prompt] | Exception | None = None
    found: Found | None = None


def found_to_plain(found: Found | None) -> list[list[Any]] | None:
    """As lists and numbers, which torch.load(weights_only=True) reads."""
    if found is None:
        return None
    return [[None if row is None else list(row) for row in rows] for rows in found]


def found_from_plain(found: Any, shift: int) -> Found | None:
    """The inverse; `shift` is added to the versions of weights."""
    if found is None:
        return None
    return [
        [
            None if row is None else Sampled(*row[:3], versions=[v + shift for v in row[3]])
            for row in rows
        ]
        for rows in found
    ]
