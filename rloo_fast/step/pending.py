"""A generation batch under way: its groups are being sampled, and scored as they finish."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from transformers import TrainerState

from ..data.seeds import step_seed
from ..records import Prompt, Rollout
from ..rollout.ahead import Group, Sampled
from ..rollout.ahead.flight import Row
from ..rollout.stops import KeptRows
from .collect import Collector, GivenByRewards, Scored, end_of


class Pending:
    """Batch `number`, with K completions of each prompt; on the main process, for all of them.

    `seed`: of the batch. Rewards are begun with the batch, so what they are given as trainer_state
    is the state at that time, as it changes.
    """

    def __init__(
        self,
        collector: Collector,
        number: int,
        prompts: Sequence[Prompt],
        num_generations: int,
        seed: int,
        state: TrainerState,
    ):
        k = num_generations
        self.collector, self.num_generations, self.state = collector, k, state
        self.rows = [prompt for prompt in prompts for _ in range(k)]
        self.groups = [
            Group(
                number,
                place,
                [*prompt.ids],
                [step_seed(seed, place, i) for i in range(k)],
                prompt.raw,
            )
            for place, prompt in enumerate(prompts)
        ]
        self._lock = threading.Lock()  # rewards hear of one completion at a time
        self._begin_rewards()

    def _begin_rewards(self) -> None:
        self.kept = KeptRows(self.collector.stops, [[*row.ids] for row in self.rows])
        self.given = GivenByRewards()
        place_of = [i // self.num_generations for i in range(len(self.rows))]
        self.scoring = self.collector.begin_rewards(
            self.rows, place_of, self.kept.texts, self.state
        )

    def on_sampled(self, row: Row, sampled: Sampled) -> None:
        """A completion is there; in any thread."""
        index = row.group.place * self.num_generations + row.sample
        with self._lock, suppress(Exception):  # what a reward raises, `scored` raises again
            count = self.kept.row(index, sampled.ids).num_tokens
            self.scoring.finished(index, sampled.ids[:count])

    def score_again(self, found: Sequence[Sequence[Sampled | None]]) -> None:
        """Some of its completions are sampled again: begin anew, with those that stay."""
        with self._lock:
            self.stop()
            self._begin_rewards()
        for group, rows in zip(self.groups, found, strict=True):
            for sample, sampled in enumerate(rows):
                if sampled is not None:
                    self.on_sampled(Row(group, sample), sampled)

    def scored(self, found: Sequence[Sequence[Sampled]]) -> Scored:
        """The whole batch, once all completions are there. Raises what a reward has raised."""
        rows = [row for group in found for row in group]
        logps: list[Any] = [row.logps for row in rows]
        newest = [row.versions[-1] for row in rows if row.versions]
        sampled = Rollout(
            [row.ids for row in rows],
            [row.finish_reason for row in rows],
            None if any(row is None for row in logps) else logps,
            weights_version=max(newest, default=None),
            token_versions=[row.versions for row in rows],
        )
        rollout = self.kept.rollout(sampled)
        with self.scoring:
            rewards = end_of(self.scoring, rollout, self.given)
        self.collector.hidden(self.scoring.hidden_s)
        looks = self.collector.with_texts
        completions = self.scoring.batch.completions(range(len(rows))) if looks else []
        return Scored(self.rows, rollout, rewards, completions, self.given)

    def stop(self) -> None:
        """Nobody waits for its rewards any more."""
        self.scoring.__exit__(RuntimeError, None, None)
