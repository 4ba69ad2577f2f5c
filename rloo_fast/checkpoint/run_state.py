"""Resumes that repeat the uninterrupted run: what the next step depends on, beside transformers'
own state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from ..distributed import TrainingEngine
from ..distributed.pickles import only_data
from .files import load_launch, load_state, reading
from .weights import START, check_trained, load_start_weights, load_weights, trained_shapes


class Stateful(Protocol):
    """Part of a run: state_dict() holds what a resumed run must go on with."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RunState:
    """What goes into every checkpoint, one file per process, and comes back in a resumed run.

    parts: each saved under its name. counters: of few numbers, whose names are their own; all are
    the same on every process but `tr_loss`. moving_reference: the reference model, where it
    follows the policy. load_rng_state: random states of a checkpoint, back in place.
    """

    def __init__(
        self,
        model: nn.Module,
        moving_reference: nn.Module | None,
        parallel: TrainingEngine,
        parts: Mapping[str, Stateful],
        counters: Sequence[Stateful],
        *,
        load_rng_state: Callable[[str], None],
    ):
        self.model, self.moving_reference, self.parallel = model, moving_reference, parallel
        self.parts, self.counters = parts, counters
        self.load_rng_state = load_rng_state
        self.resume_from: str | None = None  # the checkpoint of a run that is about to be resumed

    def state_dict(self) -> dict[str, Any]:
        """What, beside transformers' own state, the next step depends on."""
        state: dict[str, Any] = {"trained": trained_shapes(self.model)}
        for name, part in self.parts.items():
            state[name] = part.state_dict()
        for counter in self.counters:
            state |= counter.state_dict()
        return state

    def restore(self) -> bool:
        """At the start of training: go on from `resume_from`; False if it is None.

        Raises ValueError if the checkpoint was saved from another model than this run's.
        """
        checkpoint = self.resume_from
        if checkpoint is None:
            return False
        with reading(checkpoint, "rloo_state_*.pt"):
            state = self._saved(checkpoint)
            check_trained(self.model, state["trained"], checkpoint)
        if (Path(checkpoint) / START).is_file():
            load_start_weights(self.model, checkpoint)
        if self.moving_reference is not None:
            self.parallel.load_reference(self.moving_reference, checkpoint)
        with reading(checkpoint, "rng_state*.pth"):
            self.load_rng_state(checkpoint)  # transformers waits until a step is taken
        self.resume_from = None
        with reading(checkpoint, "rloo_state_*.pt"):
            for name, part in self.parts.items():
                part.load_state_dict(state.get(name, {}))
            for counter in self.counters:
                counter.load_state_dict(state)
        return True

    def _saved(self, checkpoint: str) -> dict[str, Any]:
        """This process' state_dict(); of as many processes as saved it, or of another number."""
        num_saved = load_launch(Path(checkpoint))["num_processes"]
        accelerator = self.parallel.accelerator
        if num_saved == accelerator.num_processes:
            return load_state(checkpoint, accelerator.process_index)
        states = [load_state(checkpoint, rank) for rank in range(num_saved)]
        # of the rest, all processes have the same
        return states[0] | {"tr_loss": sum(state["tr_loss"] for state in states) / num_saved}

    def load_weights(self, checkpoint: str, load: Callable[[], None]) -> None:
        """The model's weights of a checkpoint; `load`: transformers' way, for engines that read
        their own files.

        transformers loads by the files' names, which may be others than the model's, and only logs
        what has no place there.
        """
        if self.parallel.loads_checkpoints:
            with only_data():
                load()
        else:
            with reading(checkpoint, "config.json, or what it describes,"):
                load_weights(self.model, checkpoint)
