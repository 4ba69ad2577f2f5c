"""Generation batches whose completions are sampled while earlier ones are trained.

Step s trains batch s: the same prompts, with the same seeds, as without. When it begins, the
weights go to the engine, the prompts of batch s + max_staleness are asked for, and the trainer
waits for what is still missing of batch s; then it trains, and the engine goes on.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerState

from ..data.ledger import Fate
from ..data.row_functions import Row
from ..data.seeds import step_seed
from .ahead_rounds import AheadRounds
from .collect import Collected
from .rounds import Wanted
from .source import check_kind, check_sizes, sizes_of


class AheadSource:
    """A BatchSource: each round of `rounds` is a batch. With `max_staleness` 0 it gives what
    LoaderSource gives, bit for bit."""

    kind = "ahead"

    def __init__(self, rounds: AheadRounds):
        self.rounds, self.collector = rounds, rounds.collector

    def next(self, rows: list[Row], seed: int, state: TrainerState) -> Collected:
        settings, rounds = self.rounds.settings, self.rounds
        assert seed == step_seed(settings.seed, rounds.number), rounds.number
        taken = rounds.take(Wanted(settings.prompts_per_batch, seed), state)
        collected = self.collector.collected(taken.scored, settings.num_generations, "train")
        rounds.stream.mark(taken.numbers, Fate.TRAINED)
        counts = rounds.counts() | {"sampled_again": taken.num_again}
        logged = {f"async/{name}": float(value) for name, value in counts.items()}
        return collected._replace(logged=collected.logged | logged)

    def state_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "sizes": self._sizes(), **self.rounds.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_kind(state, self.kind)
        if state["batches"]:
            check_sizes(state["sizes"], self._sizes())
        self.rounds.load_state_dict(state)

    def _sizes(self) -> dict[str, int]:
        settings = self.rounds.settings
        return sizes_of(settings.prompts_per_batch, settings.num_generations)

    def close(self) -> None:
        self.rounds.close()
        self.collector.close()
