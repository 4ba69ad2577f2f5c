"""What the main process sends the others of a round that it has sampled for all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from rloo_fast.records import Prompt, Rollout, Strand, Trajectory
from rloo_fast.step.collect import GivenByRewards, Scored
from rloo_fast.step.shares import share_of


def shares_of(monkeypatch: Any, scored: Scored, rows: list[Prompt]) -> tuple[Any, list[Scored]]:
    """What two processes are sent, and have then."""
    sent: list[Any] = []

    def gathered(_: Any, mine: Any) -> list[Any]:
        sent.append(mine)
        return [sent[0], None]

    monkeypatch.setattr("rloo_fast.step.shares.gather_objects", gathered)
    shares: list[Scored] = []
    for rank, mine in enumerate((scored, None)):
        accelerator: Any = SimpleNamespace(
            num_processes=2, process_index=rank, is_main_process=rank == 0
        )
        shares.append(share_of(mine, rows, accelerator))
    return sent[0], shares


def test_rows_are_those_that_every_process_has_and_are_not_sent(monkeypatch):
    rows = [Prompt(f"{i}", [i], {}) for i in range(4)]
    ids = [[5], [6, 7], [8], [9]]
    rollout = Rollout(ids, ["stop"] * 4, None)
    given = GivenByRewards({"note": ["a", "b", "c", "d"], "odd": [1]}, {"metric": [1.0]})
    scored = Scored(rows, rollout, torch.arange(4.0).view(4, 1), list("wxyz"), given)
    (sent, prompts), shares = shares_of(monkeypatch, scored, rows)
    assert not sent.rows
    assert prompts is None
    assert [share.rows for share in shares] == [rows[:2], rows[2:]]
    assert [share.rollout.completion_ids for share in shares] == [ids[:2], ids[2:]]
    assert [share.given.extra for share in shares] == [{"note": ["a", "b"]}, {"note": ["c", "d"]}]
    assert [share.given.logged for share in shares] == [{"metric": [1.0]}, {}]
    assert shares[1].rewards.tolist() == [[2.0], [3.0]]


def test_prompts_are_sent_where_an_environment_has_written_them(monkeypatch):
    drawn = [Prompt("q", [1], {"n": i}) for i in range(4)]
    said = [Prompt(f"q in room {i}", [1, 5 + i], {"n": i}) for i in range(4)]
    trajectories = [Trajectory([Strand([1, 5 + i, 9], [2])], []) for i in range(4)]
    rollout = Rollout([[9]] * 4, ["stop"] * 4, None, trajectories=trajectories)
    scored = Scored(said, rollout, torch.zeros(4, 1), [], GivenByRewards())
    _, shares = shares_of(monkeypatch, scored, drawn)
    assert [share.rows for share in shares] == [said[:2], said[2:]]
    assert [share.rollout.trajectories for share in shares] == [trajectories[:2], trajectories[2:]]
