"""Rounds of prompts with their completions, scored: what generation batches are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd
from typing import Any, NamedTuple, Protocol

from transformers import TrainerState

from ..data.stream import PromptStream
from ..records import GenerationBatch, Prompt
from .collect import Collector, Scored


class Round(NamedTuple):
    """Prompts by their numbers in the stream; every process has a share of their completions."""

    numbers: list[int]
    scored: Scored  # rows of repeated prompts may follow, so that all shares are as large
    prompts: Callable[[], list[Prompt]]  # as tokenised, on every process
    num_again: int = 0  # of its completions, those that were sampled a second time


class Wanted(NamedTuple):
    """What the source of a round needs to know."""

    num_prompts: int
    seed: int
    # groups that wait for a batch already; no less than the share of its rounds that are done
    num_ready: float = 0
    acceptance: float = 1.0  # share of the prompts whose groups are expected to be trained


class Rounds(Protocol):
    """One round after the other; the same prompts on every process.

    The stream belongs to it: its state has the stream's. The caller says what becomes of prompts.
    """

    kind: str  # see `source.OPTIONS`

    def take(self, wanted: Wanted, state: TrainerState) -> Round:
        """The next one."""
        ...

    def end_batch(self, num_ready: float, acceptance: float) -> dict[str, int]:
        """A batch is whole, and trained next; `num_ready`: groups, with those of the batch. Returns
        counts for the log."""
        ...

    def over_age(self, group: GenerationBatch) -> bool:
        """Whether the weights that sampled it are too old for it to be trained now."""
        ...

    def again(self, numbers: Sequence[int]) -> None:
        """These prompts, which are not finished, are sampled once more in a later round."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class SampledRounds:
    """Rounds that are sampled when they are asked for, by the policy as it is."""

    kind = "stream"

    def __init__(self, collector: Collector, stream: PromptStream, num_generations: int):
        self.collector, self.stream = collector, stream
        self.num_generations = num_generations

    def take(self, wanted: Wanted, state: TrainerState) -> Round:
        with self.collector.failing_together():
            taken = self.stream.take(wanted.num_prompts)
        k, num_processes = self.num_generations, self.collector.accelerator.num_processes
        # as many completions on each process: repeat a prompt, and do not look at what it gives
        multiple = num_processes // gcd(k, num_processes)
        padding = -len(taken) % multiple
        rows = [one.row for one in taken] + [taken[-1].row] * padding
        scored = self.collector.sample(rows, k, wanted.seed, "train", state)
        return Round(
            [one.number for one in taken],
            scored,
            lambda: self.collector.tokenize(rows[: len(taken)]),
        )

    def end_batch(self, num_ready: float, acceptance: float) -> dict[str, int]:
        return {}

    def over_age(self, group: GenerationBatch) -> bool:
        return False  # what waits is of the batch before

    def again(self, numbers: Sequence[int]) -> None:
        raise NotImplementedError("nothing is ever over age")

    def state_dict(self) -> dict[str, Any]:
        return {"version": self.collector.rollouts.version(), "stream": self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])

    def close(self) -> None:
        return
