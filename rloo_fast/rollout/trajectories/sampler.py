"""Many conversations at once over one engine.

Every round, the engine samples a turn of each conversation that waits for one: as soon as a tool
has answered, its conversation goes on, and those whose tools still work join a later round. Where
processes sample together, they have as many rounds, some of them with nothing to sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from ...data.seeds import step_seed
from ...records import Prompt, Rollout, Sampling, Trajectory
from ..stops import Stops
from .conversation import Conversation, Language, Limits, ToolSet, Turn
from .rows import completion_of

TOGETHER_S = 0.05  # a round waits so long for more tools than one: fewer, larger calls

CUT = ("length", "time")  # endings of a trajectory that was not at its end


class Generate(Protocol):
    """RolloutCycle.generate, with the rest of its arguments given."""

    def __call__(
        self, prompt_ids: list[list[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> Rollout: ...


class _Round(NamedTuple):
    """What a process says before a round."""

    failure: str | None
    goes_on: bool
    room: int = 0  # most tokens of a turn
    length: int = 0  # and of a turn with what comes before it


class RoundFailed(RuntimeError):
    """Another process could not go on with its conversations; the message has its error."""


OnTrajectory = Callable[[int, list[int], Trajectory], None]  # row, its completion_ids, what it is


class TrajectorySampler:
    """Samples conversations of a run, one from each prompt.

    `everyone(value)`: the value that each process gives, in their order; all call it as often.
    """

    def __init__(
        self,
        language: Language,
        limits: Limits,
        stops: Stops,
        everyone: Callable[[Any], list[Any]] = lambda value: [value],
    ):
        self.language, self.limits, self.stops, self.everyone = language, limits, stops, everyone

    def __call__(
        self,
        generate: Generate,
        prompts: Sequence[Prompt],
        tool_sets: Sequence[ToolSet],
        sampling: Sampling,
        seeds: Sequence[int],
        on_finished: OnTrajectory = lambda row, ids, trajectory: None,
    ) -> Rollout:
        """A trajectory per prompt, in order, with the tools of its ToolSet.

        Turn t of row i is drawn with seeds[i] where t = 0, else with a seed of (seeds[i], t): from
        that and the tokens before it, whatever stands beside it (to rounding). Its finish_reason is
        "length" where it was cut: by its length, by what a tool said that did not fit, by time.
        """
        batch, failure = _Batch(self.stops, sampling, seeds, on_finished), None
        try:
            batch.begin(prompts, tool_sets, self.language, self.limits)
        except Exception as error:
            failure = error
        while True:
            rounds = self.everyone(batch.next_round(failure))
            if failure is not None:
                raise failure
            for rank, one in enumerate(rounds):
                if one.failure is not None:
                    raise RoundFailed(f"process {rank} failed: {one.failure}")
            if not any(one.goes_on for one in rounds):
                return batch.rollout()
            room, length = (max(one[i] for one in rounds) for i in (2, 3))
            try:
                batch.round(generate, room, length)
            except Exception as error:
                failure = error


class _Batch:
    """The conversations of one call."""

    def __init__(
        self,
        stops: Stops,
        sampling: Sampling,
        seeds: Sequence[int],
        on_finished: OnTrajectory,
    ):
        self.stops, self.sampling, self.seeds = stops, sampling, seeds
        self.on_finished = on_finished
        self.all: list[Conversation] = []
        self.ready: list[int] = []
        self.waiting: list[int] = []
        self.version: int | None = None

    def begin(
        self,
        prompts: Sequence[Prompt],
        tool_sets: Sequence[ToolSet],
        language: Language,
        limits: Limits,
    ) -> None:
        pairs = zip(prompts, tool_sets, strict=True)
        self.all = [Conversation(prompt, tools, language, limits) for prompt, tools in pairs]
        self.ready = [*range(len(self.all))]

    def next_round(self, failure: Exception | None) -> _Round:
        if failure is not None:
            return _Round(f"{type(failure).__name__}: {failure}", goes_on=False)
        ready = [self.all[row] for row in self.ready]
        return _Round(
            None,
            bool(self.ready or self.waiting),
            max((one.room for one in ready), default=0),
            max((one.room + len(one.prompt_ids) for one in ready), default=0),
        )

    def round(self, generate: Generate, room: int, length: int) -> None:
        """A turn of every conversation that is ready, and then wait until one is."""
        ready, self.ready = self.ready, []
        if room:  # of some process: all of them call the engine
            self._sample(ready, generate, room, length)
        self._wait_for_more([*ready, *self.waiting])
        for row in ready:
            self._sort(row)
        self._wait()

    def _sample(self, rows: list[int], generate: Generate, room: int, length: int) -> None:
        some = [self.all[row] for row in rows]
        prompts = [one.prompt_ids for one in some]
        seeds = [
            step_seed(self.seeds[row], one.num_turns) if one.num_turns else self.seeds[row]
            for row, one in zip(rows, some, strict=True)
        ]
        sampled = generate(
            [[*ids] for ids in prompts],  # an engine may be anyone's
            replace(self.sampling, max_new_tokens=room, max_length=length),
            seeds,
        )
        if sampled.weights_version is not None:
            self.version = max(self.version or 0, sampled.weights_version)
        for number, (one, ids) in enumerate(zip(some, prompts, strict=True)):
            one.add_turn(self._turn(sampled, number, ids, one.room))

    def _turn(self, sampled: Rollout, number: int, prompt: list[int], room: int) -> Turn:
        ids, reason = sampled.completion_ids[number], sampled.finish_reasons[number]
        kept = self.stops.keep(prompt, ids, reason)
        count, reason = kept.num_tokens, kept.finish_reason
        if count > room:
            count, reason = room, "length"
        logps, versions = sampled.logps, sampled.token_versions
        if versions is None and sampled.weights_version is not None:
            of_turn: list[int] | None = [sampled.weights_version] * count
        else:
            of_turn = None if versions is None else versions[number][:count]
        of_logps = None if logps is None else logps[number][:count]
        return Turn(ids[:count], reason, of_logps, of_turn)

    def _sort(self, row: int) -> None:
        """To those that are ready, that wait for their tools, or that have ended."""
        one = self.all[row]
        if one.ended is None and one.pending:
            if not one.answered():
                self.waiting.append(row)
                return
            one.go_on()
        if one.ended is None:
            self.ready.append(row)
            return
        trajectory = one.trajectory()
        self.on_finished(row, completion_of(trajectory, one.prompt.ids), trajectory)

    def _wait(self) -> None:
        """Until a conversation is ready, or none is left that waits."""
        while self.waiting and not self.ready:
            futures = [f for row in self.waiting for f in self.all[row].pending if not f.done()]
            lefts = [self.all[row].seconds_left for row in self.waiting]
            limit = min((left for left in lefts if left is not None), default=None)
            if futures:
                wait(futures, None if limit is None else max(limit, 0.0), FIRST_COMPLETED)
            self._wait_for_more(self.waiting)
            waiting, self.waiting = self.waiting, []
            for row in waiting:
                left = self.all[row].seconds_left
                if left is not None and left <= 0 and not self.all[row].answered():
                    self.all[row].give_up()
                self._sort(row)

    def _wait_for_more(self, rows: Sequence[int]) -> None:
        """Tools that answer about as fast do so for one round."""
        wait([future for row in rows for future in self.all[row].pending], TOGETHER_S)

    def rollout(self) -> Rollout:
        trajectories = [one.trajectory() for one in self.all]
        logps = [one.logps for one in self.all]
        versions = [one.versions for one in self.all]
        return Rollout(
            completion_ids=[completion_of(one.trajectory(), one.prompt.ids) for one in self.all],
            finish_reasons=["length" if one.ended in CUT else "stop" for one in trajectories],
            logps=[row for row in logps if row is not None] if None not in logps else None,
            token_versions=[row for row in versions if row is not None]
            if None not in versions
            else None,
            weights_version=self.version,
            trajectories=trajectories,
        )
