"""Where generation batches come from: `BatchSource`, and the source that samples them in the step,
of the rows that the Trainer's loader gives.

A source of another kind draws prompts from a `data.stream.PromptStream` and leaves the rows alone,
which are empty then.
"""

from __future__ import annotations

from typing import Any, Protocol

from transformers import TrainerState

from ..data.row_functions import Row
from .collect import Collected, Collector


class BatchSource(Protocol):
    """Generation batches to train on, one after the other; the same on every process.

    Its state goes into checkpoints: a run that loads it goes on with the same prompts. A step that
    fails takes it back to the state before.
    """

    def next(self, rows: list[Row], seed: int, state: TrainerState) -> Collected:
        """This process' share of the next generation batch.

        `rows`: the loader's, P of them. `seed`: of the batch, the same on every process, and in a
        run that was resumed.
        """
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if `state` is that of a source of another kind."""
        ...

    def close(self) -> None:
        """Nothing more is asked for."""
        ...


class LoaderSource:
    """The rows that the loader gives, sampled and scored when the step asks for them."""

    kind = "loader"

    def __init__(self, collector: Collector, num_generations: int):
        self.collector, self.num_generations = collector, num_generations

    def next(self, rows: list[Row], seed: int, state: TrainerState) -> Collected:
        return self.collector(rows, self.num_generations, seed, "train", state)

    def state_dict(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_kind(state, self.kind)

    def close(self) -> None:
        self.collector.close()


# kind of a source: the options that choose it
OPTIONS: dict[str, str] = {
    "ahead": "max_staleness",
    "ahead stream": "max_staleness with dynamic_sampling or curriculum",
    "stream": "dynamic_sampling or curriculum",
    LoaderSource.kind: "none of dynamic_sampling, curriculum, max_staleness",
}


def check_kind(state: dict[str, Any], kind: str) -> None:
    """Raise ValueError unless a checkpoint was saved by a source of this kind; one without a state
    is of a version that knew a single kind."""
    saved = state.get("kind", LoaderSource.kind)
    if saved != kind:
        raise ValueError(
            f"the checkpoint is of a run with {OPTIONS[saved]}, this one has {OPTIONS[kind]}: "
            "prompts would be trained twice or never; resume with the same options."
        )


def sizes_of(prompts_per_batch: int, num_generations: int) -> dict[str, int]:
    """What the groups of a source's state have in common with the run that goes on with them."""
    return {
        "prompts of a generation batch": prompts_per_batch,
        "num_generations": num_generations,
    }


def check_sizes(saved: dict[str, int], now: dict[str, int]) -> None:
    """Raise ValueError unless groups of a checkpoint fit into this run's generation batches."""
    for name, value in now.items():
        if saved[name] != value:
            raise ValueError(
                f"the checkpoint holds groups that wait for their step, of a run with {name} = "
                f"{saved[name]}, but now it is {value}: resume with the same."
            )
