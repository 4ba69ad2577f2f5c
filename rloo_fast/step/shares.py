"""What the main process has sampled and scored for all, shared out."""

from __future__ import annotations

from dataclasses import replace

from accelerate import Accelerator

from ..distributed.collectives import gather_objects
from ..records import Prompt, PromptText, Rollout
from .collect import GivenByRewards, Scored


def share_of(scored: Scored | None, rows: list[Prompt], accelerator: Accelerator) -> Scored:
    """This process' rows of what the main one has; None on the others. `rows`: all of them, which
    every process has, and which are not sent: images are large. Of trajectories, what environments
    made of their prompts is. Every process must call."""
    if accelerator.num_processes == 1:
        assert scored is not None
        return scored
    sent = scored and (scored._replace(rows=[]), _prompts_of(scored))
    everyone = gather_objects(accelerator, sent)
    assert everyone[0] is not None
    whole, prompts = everyone[0]
    size = len(rows) // accelerator.num_processes
    start = accelerator.process_index * size
    mine = slice(start, start + size)
    extra = {n: v[mine] for n, v in whole.given.extra.items() if len(v) == len(rows)}
    own = rows[mine]
    if prompts is not None:
        pairs = zip(own, prompts[mine], strict=True)
        own = [replace(row, text=text, ids=ids) for row, (text, ids) in pairs]
    return Scored(
        own,
        _rows_of(whole.rollout, mine),
        whole.rewards[mine],
        whole.completions[mine],
        GivenByRewards(extra, whole.given.logged if accelerator.is_main_process else {}),
    )


def _prompts_of(scored: Scored) -> list[tuple[PromptText, list[int]]] | None:
    if scored.rollout.trajectories is None:
        return None
    return [(row.text, row.ids) for row in scored.rows]


def _rows_of(rollout: Rollout, rows: slice) -> Rollout:
    return Rollout(
        rollout.completion_ids[rows],
        rollout.finish_reasons[rows],
        rollout.logps and rollout.logps[rows],
        weights_version=rollout.weights_version,
        token_versions=rollout.token_versions and rollout.token_versions[rows],
        trajectories=rollout.trajectories and rollout.trajectories[rows],
    )
