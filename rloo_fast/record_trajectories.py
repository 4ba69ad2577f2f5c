"""What a conversation of several turns is to a run: see `records.py`, which has it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Message = dict[str, Any]


class Strand(NamedTuple):
    """Tokens of a row, behind its prompt or with it, and which of them count in the loss.

    A trajectory whose history was rewritten has several: a token counts where it was sampled.
    Strand([7, 8, 9, 4, 1], [0, 1, 4]): the tokens 9 and 4 came from a tool.
    """

    ids: list[int]
    counted: Sequence[int]  # places in ids, ascending


@dataclass(frozen=True)
class Trajectory:
    """A conversation with tools, as a rollout leaves it.

    Every sampled token is counted in one strand, that in which it was drawn. `seconds` are those
    spent waiting for tools.
    """

    strands: list[Strand]  # with their prompts
    messages: list[Message]  # behind the prompt: what reward functions get as the completion
    num_calls: int = 0
    num_failures: int = 0  # calls whose tool raised, hung, was not there or was called wrongly
    num_turns: int = 1
    seconds: float = 0.0
    # "answer": the last turn calls no tool; "calls": max_tool_calling_iterations; "length": no room
    # for the turn or for what a tool said; "time": the trajectory's limit; "failure": of a tool
    ended: str = "answer"

    @property
    def num_sampled(self) -> int:
        return sum(len(strand.counted) for strand in self.strands)
