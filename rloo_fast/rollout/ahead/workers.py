"""Threads that sample the groups of a flight, with either kind of engine.

requests   an engine that answers them one by one: weights are loaded while they are under way
calls      any other that has its own weights: all that may start is a call of `generate`, weights
           are loaded between two calls

Without tools a row is one request. With them it is a conversation, each of whose turns is one; of
an engine of calls, all rows that may start are held as conversations side by side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from ...records import Rollout, Sampling
from ...rewards.calls import daemon
from ..engine import EngineError
from ..trajectories import Generate
from .cycle import SharedCycle
from .flight import Flight, Row, Sampled
from .requests import RequestEngine, rollout_of, sampled_of

# rows, what samples a turn of each, how -> their trajectories
Converse = Callable[[list[Row], Generate, Sampling], list[Sampled]]


class Workers(ABC):
    """Started once; they end when the flight is closed. `converse`: of a run with tools."""

    def __init__(self, converse: Converse | None = None):
        self.converse = converse

    @abstractmethod
    def start(self, flight: Flight, sampling: Sampling) -> None: ...

    def stop(self) -> None:
        """After the flight was closed: nobody waits for what is still under way."""
        return


class RequestWorkers(Workers):
    """A thread per open request."""

    def __init__(self, engine: RequestEngine, converse: Converse | None = None):
        super().__init__(converse)
        self.engine = engine

    def start(self, flight: Flight, sampling: Sampling) -> None:
        self.engine.begin()
        for number in range(flight.max_inflight):
            daemon(lambda: self._work(flight, sampling), f"rollout-request-{number}")

    def _work(self, flight: Flight, sampling: Sampling) -> None:
        try:
            while (row := flight.next_row()) is not None:
                if self.converse is None:
                    sampled = self._complete(row, sampling)
                else:
                    (sampled,) = self.converse([row], partial(self._turn, flight), sampling)
                flight.put(row, sampled)
        except BaseException as error:  # the trainer's thread is waiting for it
            flight.fail(error)

    def _complete(self, row: Row, sampling: Sampling) -> Sampled:
        prompt, seed = row.group.prompt, row.group.seeds[row.sample]
        prepared = self.engine.prepare(sampling, len(prompt.ids))
        if prompt.raw is None:
            return self.engine.complete([*prompt.ids], seed, prepared)
        return self.engine.complete_raw([*prompt.ids], prompt.raw, seed, prepared)

    def _turn(
        self, flight: Flight, prompt_ids: list[list[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> Rollout:
        """Of the one conversation of a thread, unless nobody waits for it any more."""
        (ids,), (seed,) = prompt_ids, seeds
        with _while_open(flight):
            sampled = self.engine.complete(ids, seed, self.engine.prepare(sampling, len(ids)))
        return rollout_of([sampled], with_versions=True)

    def stop(self) -> None:
        self.engine.hang_up()


class CallWorker(Workers):
    """One thread, and one call at a time."""

    def __init__(self, cycle: SharedCycle, converse: Converse | None = None):
        super().__init__(converse)
        self.cycle = cycle

    def start(self, flight: Flight, sampling: Sampling) -> None:
        daemon(lambda: self._work(flight, sampling), "rollout-calls")

    def _work(self, flight: Flight, sampling: Sampling) -> None:
        try:
            while rows := flight.next_rows():
                if self.converse is None:
                    sampled = self._call(rows, sampling)
                else:
                    sampled = self.converse(rows, partial(self._turns, flight), sampling)
                for row, one in zip(rows, sampled, strict=True):
                    flight.put(row, one)
        except BaseException as error:  # the trainer's thread is waiting for it
            flight.fail(error)

    def _call(self, rows: list[Row], sampling: Sampling) -> list[Sampled]:
        rollout = self.cycle.generate_as_loaded(
            [[*row.group.prompt.ids] for row in rows],
            sampling,
            [row.group.seeds[row.sample] for row in rows],
            [row.group.prompt.raw for row in rows],
        )
        return sampled_of(rollout)

    def _turns(
        self, flight: Flight, prompt_ids: list[list[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> Rollout:
        with _while_open(flight):
            return self.cycle.generate_as_loaded(prompt_ids, sampling, seeds, [])


@contextmanager
def _while_open(flight: Flight) -> Iterator[None]:
    """Around a turn: once the flight is closed, none is asked for, and no tool called by one."""
    _check_open(flight)
    yield
    _check_open(flight)


def _check_open(flight: Flight) -> None:
    if flight.is_closed:
        raise EngineError("the flight is closed")


def make_workers(cycle: SharedCycle, converse: Converse | None = None) -> Workers:
    """Those that suit the engine of `cycle`."""
    if isinstance(cycle.engine, RequestEngine):
        return RequestWorkers(cycle.engine, converse)
    return CallWorker(cycle, converse)
