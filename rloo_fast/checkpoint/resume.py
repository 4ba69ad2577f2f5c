"""From what `resume_from_checkpoint` says to a checkpoint that the run can go on from."""

from __future__ import annotations

from ..config.rloo_config import RLOOConfig
from ..distributed import TrainingEngine
from .files import find_checkpoint
from .optimizer_settings import compare_with_checkpoint


def checkpoint_to_resume(
    resume: str | bool | None, args: RLOOConfig, parallel: TrainingEngine
) -> str | None:
    """Its directory, whole and of a launch like this one; settings that differ are said.

    Raises ValueError for a checkpoint that cannot be resumed from.
    """
    checkpoint = find_checkpoint(resume, str(args.output_dir), parallel)
    if checkpoint is not None:
        says = parallel.accelerator.is_main_process
        compare_with_checkpoint(checkpoint, args, says=says)
    return checkpoint
