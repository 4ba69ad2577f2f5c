"""Threads that sample the groups of a flight, with either kind of engine.

requests   an engine that answers them one by one: weights are loaded while they are under way
calls      any other that has its own weights: all that may start is a call of `generate`, weights
           are loaded between two calls
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from ...records import Sampling
from ...rewards.calls import daemon
from .cycle import SharedCycle
from .flight import Flight, Row, Sampled
from .requests import RequestEngine


class Workers(ABC):
    """Started once; they end when the flight is closed."""

    @abstractmethod
    def start(self, flight: Flight, sampling: Sampling) -> None: ...

    def stop(self) -> None:
        """After the flight was closed: nobody waits for what is still under way."""
        return


class RequestWorkers(Workers):
    """A thread per open request."""

    def __init__(self, engine: RequestEngine):
        self.engine = engine

    def start(self, flight: Flight, sampling: Sampling) -> None:
        self.engine.begin()
        for number in range(flight.max_inflight):
            daemon(lambda: self._work(flight, sampling), f"rollout-request-{number}")

    def _work(self, flight: Flight, sampling: Sampling) -> None:
        try:
            while (row := flight.next_row()) is not None:
                prompt_ids, seed = row.group.prompt_ids, row.group.seeds[row.sample]
                prepared = self.engine.prepare(sampling, len(prompt_ids))
                if (raw := row.group.raw) is None:
                    sampled = self.engine.complete(prompt_ids, seed, prepared)
                else:
                    sampled = self.engine.complete_raw(prompt_ids, raw, seed, prepared)
                flight.put(row, sampled)
        except BaseException as error:  # the trainer's thread is waiting for it
            flight.fail(error)

    def stop(self) -> None:
        self.engine.hang_up()


class CallWorker(Workers):
    """One thread, and one call at a time."""

    def __init__(self, cycle: SharedCycle):
        self.cycle = cycle

    def start(self, flight: Flight, sampling: Sampling) -> None:
        daemon(lambda: self._work(flight, sampling), "rollout-calls")

    def _work(self, flight: Flight, sampling: Sampling) -> None:
        try:
            while rows := flight.next_rows():
                sampled = self._call(rows, sampling)
                for row, one in zip(rows, sampled, strict=True):
                    flight.put(row, one)
        except BaseException as error:  # the trainer's thread is waiting for it
            flight.fail(error)

    def _call(self, rows: list[Row], sampling: Sampling) -> list[Sampled]:
        rollout = self.cycle.generate_as_loaded(
            [list(row.group.prompt_ids) for row in rows],
            sampling,
            [row.group.seeds[row.sample] for row in rows],
            [row.group.raw for row in rows],
        )
        version = rollout.weights_version
        assert version is not None
        logps: Any = rollout.logps or [None] * len(rows)
        found = zip(rollout.completion_ids, rollout.finish_reasons, logps, strict=True)
        return [Sampled(ids, reason, lps, [version] * len(ids)) for ids, reason, lps in found]


def make_workers(cycle: SharedCycle) -> Workers:
    """Those that suit the engine of `cycle`."""
    if isinstance(cycle.engine, RequestEngine):
        return RequestWorkers(cycle.engine)
    return CallWorker(cycle)
