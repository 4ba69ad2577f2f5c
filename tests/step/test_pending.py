"""A batch under way: its environments, and its rewards."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from rloo_fast.records import Prompt, Strand, Trajectory
from rloo_fast.rollout.ahead import Held, Sampled
from rloo_fast.rollout.ahead.flight import Row
from rloo_fast.step.pending import Pending

PROMPT = Prompt([{"role": "user", "content": "w7"}], [7], {})


class Rewards:
    """As Scoring, of rewards that are not computed."""

    may_be_at_work = False

    def __init__(self, *_: Any):
        self.rows: list[int] = []
        self.batch: Any = SimpleNamespace(set_row=lambda *_: None)

    def finished(self, row: int, ids: list[int]) -> None:
        self.rows.append(row)

    def __exit__(self, *_: Any) -> None:
        return


def pending_of() -> Pending:
    collector: Any = SimpleNamespace(
        tools=SimpleNamespace(has_environments=True), stops=None, begin_rewards=Rewards
    )
    state: Any = SimpleNamespace()
    return Pending(collector, 0, [PROMPT], 2, 0, state)


def trajectory(closed: list[bool]) -> Sampled:
    held = Held(PROMPT, "a room", lambda reuse=True: closed.append(reuse))
    return Sampled([9], "stop", None, [0], Trajectory([Strand([7, 9], [1])], []), held)


def test_what_comes_once_it_was_stopped_gives_its_environment_back_and_is_not_scored():
    pending, early, late = pending_of(), list[bool](), list[bool]()
    pending.on_sampled(Row(pending.groups[0], 0), trajectory(early))
    pending.stop()
    pending.on_sampled(Row(pending.groups[0], 1), trajectory(late))
    assert (early, late) == ([True], [True])
    scoring: Any = pending.scoring
    assert scoring.rows == [0]


def test_no_trajectory_gets_an_environment_that_a_reward_may_be_called_on():
    pending, closed = pending_of(), list[bool]()
    found = [trajectory(closed), trajectory(closed)]
    for sample, one in enumerate(found):
        pending.on_sampled(Row(pending.groups[0], sample), one)
    scoring: Any = pending.scoring
    scoring.may_be_at_work = True
    pending.score_again([[None, found[1]]])
    assert closed == [False]
    pending.stop()
    assert closed == [False, True]
