"""Threads that sample the groups of a flight."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from rloo_fast.records import Rollout, Sampling
from rloo_fast.rollout.ahead import CallWorker, Flight, RequestWorkers, Sampled, Workers
from rloo_fast.rollout.engine import EngineError
from tests.rollout.test_flight import flight_of, group, nobody

SAMPLING = Sampling(1.0, 1.0, 0, None, 1.0, max_new_tokens=4, stop_token_ids=())


def by_requests(flight: Flight, converse: Any) -> Workers:
    def complete(*_: Any) -> Sampled:
        flight.close()
        return Sampled([9], "stop", [-0.5], [0])

    engine: Any = SimpleNamespace(
        begin=lambda: None, prepare=lambda sampling, longest: sampling, complete=complete
    )
    return RequestWorkers(engine, converse)


def by_calls(flight: Flight, converse: Any) -> Workers:
    def generate(*_: Any) -> Rollout:
        flight.close()
        return Rollout([[9]], ["stop"], [[-0.5]], weights_version=0)

    cycle: Any = SimpleNamespace(generate_as_loaded=generate)
    return CallWorker(cycle, converse)


@pytest.mark.parametrize("workers", [by_requests, by_calls])
def test_a_turn_that_ends_after_its_flight_was_closed_calls_no_tool(workers):
    flight, ended, called = flight_of(0, max_inflight=2), threading.Event(), []

    def converse(rows: list[Any], generate: Any, sampling: Sampling) -> list[Sampled]:
        try:
            generate([[7]], sampling, [0])
            called.append("a tool")
        except EngineError:
            ended.set()
        raise KeyError("nobody waits for it")

    flight.submit([group(0)], nobody)
    workers(flight, converse).start(flight, SAMPLING)
    assert ended.wait(5)
    assert not called
