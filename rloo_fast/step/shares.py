"""What the main process has sampled and scored for all, shared out."""

from __future__ import annotations

from accelerate import Accelerator

from ..distributed.collectives import gather_objects
from ..records import Prompt, Rollout
from .collect import GivenByRewards, Scored


def share_of(scored: Scored | None, rows: list[Prompt], accelerator: Accelerator) -> Scored:
    """This process' rows of what the main one has; None on the others. `rows`: all of them, which
    every process has, and which are not sent: images are large. Every process must call."""
    if accelerator.num_processes == 1:
        assert scored is not None
        return scored
    whole = gather_objects(accelerator, scored and scored._replace(rows=[]))[0]
    assert whole is not None
    size = len(rows) // accelerator.num_processes
    start = accelerator.process_index * size
    mine = slice(start, start + size)
    extra = {n: v[mine] for n, v in whole.given.extra.items() if len(v) == len(rows)}
    return Scored(
        rows[mine],
        _rows_of(whole.rollout, mine),
        whole.rewards[mine],
        whole.completions[mine],
        GivenByRewards(extra, whole.given.logged if accelerator.is_main_process else {}),
    )


def _rows_of(rollout: Rollout, rows: slice) -> Rollout:
    return Rollout(
        rollout.completion_ids[rows],
        rollout.finish_reasons[rows],
        rollout.logps and rollout.logps[rows],
        weights_version=rollout.weights_version,
        token_versions=rollout.token_versions and rollout.token_versions[rows],
    )
