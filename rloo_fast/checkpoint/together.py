"""Agreement between processes: what happens on one of them, all act on."""

from __future__ import annotations

from collections.abc import Callable

from accelerate import Accelerator

from ..distributed.collectives import any_process


def run_together(accelerator: Accelerator, action: Callable[[], None]) -> None:
    """Run `action`; if it raises on one process, raise on all.

    For each part of a checkpoint: a process that left in between would be missing from the engine's
    collectives in the next one.
    """
    try:
        action()
    except Exception:
        any_process(accelerator, True)
        raise
    if any_process(accelerator, False):
        raise OSError("it failed on another process")
