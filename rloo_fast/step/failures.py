"""What rollouts, rewards and the sampler check raise ends a run, but costs none of its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from ..checkpoint.run_state import Stateful
from ..checkpoint.writer import CheckpointWriter
from ..distributed import TrainingEngine
from ..weight_sync.sampler_check import SamplerMismatch
from .collect import Collector


class SaveOnFailure:
    """Saves the state before a step that fails, unless that has been done.

    Saving takes all processes, so it is done only for what all of them raise together: an error of
    `collector`, or a SamplerMismatch. `undone`: what a step changes before its update, and gets
    back.
    """

    def __init__(
        self,
        undone: Sequence[Stateful],
        collector: Collector,
        parallel: TrainingEngine,
        writer: CheckpointWriter,
    ):
        self.undone, self.collector = undone, collector
        self.parallel, self.writer = parallel, writer

    @contextmanager
    def around(
        self, model: nn.Module, step: int, save: Callable[[], Path | None]
    ) -> Iterator[None]:
        """Around what is done after `step` optimizer steps; `save` writes their checkpoint, and
        returns where, if it could not be in the output_dir."""
        before = [part.state_dict() for part in self.undone]
        try:
            yield
        except Exception as error:
            if not (self.collector.failed or isinstance(error, SamplerMismatch)):
                raise
            self.collector.rollouts.close()
            if step not in (0, self.writer.last_saved_step):
                for part, state in zip(self.undone, before, strict=True):
                    part.load_state_dict(state)
                self.parallel.drop_gradients(model)
                if elsewhere := save():
                    error.add_note(f"The {step} steps done are in {elsewhere}: resume from it.")
            if step and self.writer.last_saved_step == step:
                error.add_note(
                    f"checkpoint-{step} holds the {step} steps done: resume_from_checkpoint=True."
                )
            raise
