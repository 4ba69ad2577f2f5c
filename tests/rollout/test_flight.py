"""Groups asked for ahead: when one may start, what waits, what is sampled again."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from rloo_fast.records import Prompt
from rloo_fast.rollout.ahead import Flight, Group, Held, Sampled
from rloo_fast.rollout.ahead.flight import Row

K = 2


def group(batch: int, place: int = 0) -> Group:
    return Group(batch, place, Prompt("w7", [7], {}), [place * K + i for i in range(K)])


def sampled(*versions: int) -> Sampled:
    return Sampled([9] * len(versions), "stop", [-0.5] * len(versions), list(versions))


def flight_of(max_staleness: int, **options: Any) -> Flight:
    return Flight(
        **{
            "max_staleness": max_staleness,
            "max_inflight": 100,
            "queue_maxsize": 100,
            **options,
        }
    )


def nobody(row: Any, sampled: Sampled) -> None:
    return


def started(flight: Flight) -> list[tuple[int, int, int]]:
    """What may be sampled now, as (batch, place, sample)."""
    rows: list[Any] = []
    thread = threading.Thread(target=lambda: rows.extend(flight.next_rows()), daemon=True)
    thread.start()
    thread.join(0.1)
    if thread.is_alive():  # it waits: let it go with nothing
        flight.close()
        thread.join()
        flight._closed = False
    return [(row.group.batch, row.group.place, row.sample) for row in rows]


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_a_batch_may_start_as_soon_as_its_tokens_will_not_be_older_than_the_bound(lag):
    flight = flight_of(lag)
    flight.advance(now=5, policy=8, engine=8)
    flight.submit([group(batch) for batch in range(5, 12)], nobody)
    assert {batch for batch, _, _ in started(flight)} == set(range(5, 5 + lag + 1))


def test_an_engine_with_older_weights_may_start_less():
    flight = flight_of(3)
    flight.advance(now=5, policy=8, engine=6)
    flight.submit([group(batch) for batch in range(5, 12)], nobody)
    assert {batch for batch, _, _ in started(flight)} == {5, 6}
    flight.advance(now=5, policy=8, engine=8)
    assert {batch for batch, _, _ in started(flight)} == {7, 8}


def test_groups_start_whole_and_in_order_as_far_as_there_is_room():
    flight = flight_of(1, max_inflight=2)
    flight.submit([group(0, 0), group(0, 1)], nobody)
    assert started(flight) == [(0, 0, 0), (0, 0, 1)]
    flight.put(row_of(flight, 0, 0, 0), sampled(0))
    assert started(flight) == [], "one place is not enough for a group"
    flight.put(row_of(flight, 0, 0, 1), sampled(0))
    assert started(flight) == [(0, 1, 0), (0, 1, 1)]


def row_of(flight: Flight, batch: int, place: int, sample: int) -> Any:
    from rloo_fast.rollout.ahead.flight import Row

    return Row(next(g for g, _ in flight.known() if (g.batch, g.place) == (batch, place)), sample)


def test_what_waits_for_its_step_holds_back_what_could_be_started():
    flight = flight_of(3, queue_maxsize=2 * K)
    flight.submit([group(batch) for batch in range(3)], nobody)
    assert [batch for batch, _, _ in started(flight)] == [0, 0, 1, 1]
    for batch in (0, 1):
        for sample in range(K):
            flight.put(row_of(flight, batch, 0, sample), sampled(0))
    assert started(flight) == []
    assert flight.counts() == {"waiting": K, "in_flight": 0, "queued": 2 * K}
    flight.take(0)
    assert [batch for batch, _, _ in started(flight)] == [2, 2]


def test_the_trainer_gets_groups_in_their_order_once_all_are_there():
    flight, heard = flight_of(0), []
    flight.submit([group(0, 0), group(0, 1)], lambda row, one: heard.append(row.group.place))
    started(flight)
    thread = threading.Thread(
        target=lambda: [
            flight.put(row_of(flight, 0, place, sample), sampled(place, sample))
            for place in (1, 0)
            for sample in range(K)
        ]
    )
    thread.start()
    found = flight.wait(0)
    thread.join()
    assert [[row.versions for row in rows] for rows in found] == [
        [[0, 0], [0, 1]],
        [[1, 0], [1, 1]],
    ]
    assert heard == [1, 1, 0, 0]


def test_completions_over_age_are_sampled_again_before_the_batch_is_there():
    flight = flight_of(1)
    flight.submit([group(0)], nobody, [[sampled(0), sampled(3)]])
    assert flight.wait(0)[0][0].versions == [0]
    flight.sample_again([row_of(flight, 0, 0, 0)], nobody)
    assert flight.num_sampled_again == 1
    assert started(flight) == [(0, 0, 0)]
    flight.put(row_of(flight, 0, 0, 0), sampled(4))
    assert [row.versions for row in flight.wait(0)[0]] == [[4], [3]]


def test_what_is_there_already_is_not_sampled():
    flight, heard = flight_of(0), []
    found = [[sampled(0), None]]
    flight.submit([group(0)], lambda row, one: heard.append(row.sample), found)
    assert heard == [0]
    assert started(flight) == [(0, 0, 1)]
    assert flight.counts() == {"waiting": 0, "in_flight": 1, "queued": 1}


def test_the_batch_that_is_waited_for_starts_also_where_a_checkpoint_brought_more_than_fits():
    flight = flight_of(3, queue_maxsize=K)
    there = [[sampled(0)] * K]
    flight.submit([group(0)], nobody)
    flight.submit([group(1)], nobody, there)
    flight.submit([group(2)], nobody)
    assert started(flight) == [(0, 0, 0), (0, 0, 1)]


def test_an_error_of_an_engine_reaches_the_trainer():
    flight = flight_of(0)
    flight.submit([group(0)], nobody)
    flight.fail(RuntimeError("the engine"))
    with pytest.raises(RuntimeError, match="the engine"):
        flight.wait(0)


def test_what_comes_after_the_end_is_dropped():
    flight = flight_of(0)
    flight.submit([group(0)], nobody)
    started(flight)
    row = row_of(flight, 0, 0, 0)
    flight.close()
    flight.put(row, sampled(0))
    assert flight.known()[0][1] == [None, None]
    assert flight.next_row() is None


def test_what_comes_after_the_end_lets_go_of_its_environment():
    flight, closed, heard = flight_of(1), [], []
    flight.submit([group(0)], lambda *given: heard.append(given))
    flight.close()
    held = Held(Prompt("w7", [7], {}), "a room", lambda: closed.append("a room"))
    flight.put(Row(group(0), 0), sampled(0)._replace(held=held))
    assert closed == ["a room"]
    assert not heard
