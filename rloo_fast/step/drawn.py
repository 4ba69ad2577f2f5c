"""Prompts of a round that is sampled ahead, and what is there of their completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..records import Prompt, Strand, Trajectory
from ..rollout.ahead import Sampled
from ..tools import RunTools

Found = list[list[Sampled | None]]  # completions of each group, None: not there


@dataclass
class Drawn:
    """The prompts of a round, by their numbers in the stream. `prompts`: None after a resume, or
    what a prompt raised, which is raised once the round is taken. `found`: of a checkpoint."""

    numbers: list[int]
    prompts: list[Prompt] | Exception | None = None
    found: Found | None = None

    def leave_out_unfit(self, tools: RunTools | None) -> None:
        """What a run with other tools has sampled: trajectories where there are none now, the other
        way round, or trajectories without the environment that `tools` give each."""
        if tools is not None and tools.has_environments:
            self.found = None
        for rows in self.found or []:
            fits = [row is not None and (row.trajectory is None) == (tools is None) for row in rows]
            rows[:] = [row if fit else None for row, fit in zip(rows, fits, strict=True)]


def found_to_plain(found: Found | None) -> list[list[Any]] | None:
    """As lists and numbers, which torch.load(weights_only=True) reads."""
    if found is None:
        return None
    return [[None if row is None else _to_plain(row) for row in rows] for rows in found]


def _to_plain(row: Sampled) -> list[Any]:
    trajectory = row.trajectory and {
        **vars(row.trajectory),
        "strands": [[strand.ids, [*strand.counted]] for strand in row.trajectory.strands],
    }
    return [row.ids, row.finish_reason, row.logps, row.versions, trajectory]


def found_from_plain(found: Any, shift: int) -> Found | None:
    """The inverse; `shift` is added to the versions of weights."""
    if found is None:
        return None
    return [[None if row is None else _from_plain(row, shift) for row in rows] for rows in found]


def _from_plain(row: list[Any], shift: int) -> Sampled:
    ids, reason, logps, versions, *more = row  # before there were tools, nothing more
    trajectory = more[0] if more else None
    if trajectory is not None:
        strands = [Strand(*strand) for strand in trajectory["strands"]]
        trajectory = Trajectory(**{**trajectory, "strands": strands})
    return Sampled(ids, reason, logps, [v + shift for v in versions], trajectory)
