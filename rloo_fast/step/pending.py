"""A generation batch under way: its groups are being sampled, and scored as they finish."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress

from transformers import TrainerState

from ..data.seeds import step_seed
from ..records import Message, Prompt
from ..rewards.functions import ENVIRONMENTS
from ..rollout.ahead import Group, Held, Sampled
from ..rollout.ahead.flight import Row
from ..rollout.ahead.requests import rollout_of
from ..rollout.stops import KeptRows
from .collect import Collector, GivenByRewards, Scored, end_of


class Pending:
    """Batch `number`, with K completions of each prompt; on the main process, for all of them.

    `seed`: of the batch. Rewards are begun with the batch, so what they are given as trainer_state
    is the state at that time, as it changes. Environments are held until the batch is scored.
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
            Group(number, place, prompt, [step_seed(seed, place, i) for i in range(k)])
            for place, prompt in enumerate(prompts)
        ]
        self._lock = threading.Lock()  # rewards hear of one completion at a time
        self._held: dict[int, Held] = {}  # by row
        self._stopped = False
        self._begin_rewards()

    def _begin_rewards(self) -> None:
        tools = self.collector.tools
        self.kept = KeptRows(self.collector.stops, [[*row.ids] for row in self.rows])
        self.messages: dict[int, list[Message]] = {}  # of rows that are trajectories
        self.given = GivenByRewards()
        place_of = [i // self.num_generations for i in range(len(self.rows))]
        has_environments = tools is not None and tools.has_environments
        self.scoring = self.collector.begin_rewards(
            self.rows,
            place_of,
            self.kept.texts if tools is None else self.messages,
            self.state,
            [None] * len(self.rows) if has_environments else None,  # they come with the rows
        )

    def on_sampled(self, row: Row, sampled: Sampled) -> None:
        """A completion is there; in any thread."""
        index = row.group.place * self.num_generations + row.sample
        with self._lock:
            if self._stopped:
                if sampled.held is not None:
                    sampled.held.close()
                return
            if sampled.held is not None:
                self._hold(index, sampled.held)
            with suppress(Exception):  # what a reward raises, `scored` raises again
                self.scoring.finished(index, self._kept(index, sampled))

    def _hold(self, index: int, held: Held) -> None:
        self._held[index], self.rows[index] = held, held.prompt
        self.scoring.batch.set_row(index, held.prompt.text, {ENVIRONMENTS: held.environment})

    def _kept(self, index: int, sampled: Sampled) -> list[int]:
        if sampled.trajectory is not None:  # whose turns were kept one by one
            self.messages[index] = sampled.trajectory.messages
            return sampled.ids
        return sampled.ids[: self.kept.row(index, sampled.ids).num_tokens]

    def score_again(self, found: Sequence[Sequence[Sampled | None]]) -> None:
        """Some of its completions are sampled again: begin anew, with those that stay."""
        with self._lock:
            self._end_rewards()
            rows = [row for group in found for row in group]
            self._let_go([i for i, row in enumerate(rows) if row is None and i in self._held])
            self._begin_rewards()
        for group, samples in zip(self.groups, found, strict=True):
            for sample, sampled in enumerate(samples):
                if sampled is not None:
                    self.on_sampled(Row(group, sample), sampled)

    def scored(self, found: Sequence[Sequence[Sampled]]) -> Scored:
        """The whole batch, once all completions are there. Raises what a reward has raised."""
        rollout = rollout_of([row for group in found for row in group], with_versions=True)
        if rollout.trajectories is None:
            rollout = self.kept.rollout(rollout)
        with self.scoring:
            rewards = end_of(self.scoring, rollout, self.given)
        self.collector.hidden(self.scoring.hidden_s)
        looks = self.collector.with_texts
        completions = self.scoring.batch.completions(range(len(self.rows))) if looks else []
        self._let_go([*self._held])
        return Scored(self.rows, rollout, rewards, completions, self.given)

    def stop(self) -> None:
        """Nobody waits for its rewards any more."""
        with self._lock:
            self._stopped = True
            self._end_rewards()
            self._let_go([*self._held])

    def _end_rewards(self) -> None:
        self.scoring.__exit__(RuntimeError, None, None)

    def _let_go(self, rows: list[int]) -> None:
        """Others may have their environments, unless a reward function still looks at them: once
        begun it cannot be stopped."""
        reuse = not self.scoring.may_be_at_work
        for row in rows:
            self._held.pop(row).close(reuse=reuse)
