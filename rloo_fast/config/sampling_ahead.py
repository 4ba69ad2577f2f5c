"""The fields that say how far ahead of their step completions are sampled. Names are those of TRL's
AsyncGRPOConfig."""

from __future__ import annotations

from dataclasses import dataclass

from .documented import documented as _field


@dataclass
class SamplingAhead:
    """See docs/asynchronous.md."""

    max_staleness: int = _field(
        0,
        "0: completions are sampled, then trained on. N: while a step is trained, completions of "
        "the next N are sampled; a token is at most N optimizer steps old when it is trained.",
    )
    max_inflight_tasks: int = _field(
        -1,
        "Most completions that are sampled at a time with max_staleness. -1: all that may be, up "
        "to 1024.",
    )
    weight_sync_steps: int = _field(
        1, "Optimizer steps from one weight update of the engine to the next, with max_staleness."
    )
    queue_maxsize: int = _field(
        -1,
        "Most completions that are being sampled or wait for their step, with max_staleness. -1: "
        "those of max_staleness + 1 generation batches, with dynamic_sampling of all their rounds.",
    )
