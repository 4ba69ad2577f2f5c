"""The fields that say how trajectories call tools. Names that TRL's GRPOConfig has are TRL's."""

from __future__ import annotations

from dataclasses import dataclass

from .documented import documented as _field


@dataclass
class ToolUse:
    """See docs/tools.md."""

    max_tool_calling_iterations: int | None = _field(
        None,
        "Most turns of a trajectory whose tool calls are carried out. Default: no limit but "
        "max_completion_length.",
    )
    tool_timeout_s: float | None = _field(
        60.0,
        "Longest a call of a tool, or reset of an environment, may take, in seconds; none: no "
        "limit. A call that takes longer has failed.",
    )
    trajectory_timeout_s: float | None = _field(
        None,
        "Longest a trajectory may take, tools and sampling together, in seconds; then it ends "
        "where it is. Default: no limit.",
    )
    tool_failure: str = _field(
        "answer",
        "What a tool call that fails does: answer: its error is what the model reads | end: the "
        "trajectory ends there.",
    )
    tool_threads: int = _field(
        32,
        "Tools that are no async functions run in so many threads. 0: one after another in the "
        "trainer's own, without a time limit.",
    )
