"""What the trajectories of a generation batch did with their tools, over all processes."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import Accelerator

from ..distributed.collectives import gather_objects
from ..records import Trajectory

ENDINGS = ("calls", "length", "time", "failure")  # see Trajectory.ended; the usual one is "answer"


def tool_metrics(
    accelerator: Accelerator, trajectories: Sequence[Trajectory], num_left_behind: int
) -> dict[str, float]:
    """Metrics by name. `num_left_behind`: threads of this process that run a call given up."""
    mine = [
        len(trajectories),
        sum(one.num_calls for one in trajectories),
        sum(one.num_failures for one in trajectories),
        sum(one.num_turns for one in trajectories),
        sum(one.seconds for one in trajectories),
        num_left_behind,
        *(sum(one.ended == why for one in trajectories) for why in ENDINGS),
    ]
    totals = [sum(column) for column in zip(*gather_objects(accelerator, mine), strict=True)]
    count, calls, failures, turns, seconds, left_behind, *ended = totals
    return {
        "tools/call_frequency": calls / count,
        "tools/failure_frequency": failures / calls if calls else 0.0,
        "tools/turns": turns / count,
        "tools/wait_s": seconds / count,
        "tools/threads_left_behind": float(left_behind),
        **{f"tools/ended_by_{why}": n / count for why, n in zip(ENDINGS, ended, strict=True)},
    }
