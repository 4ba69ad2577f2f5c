"""What the main process sends the others of a round that it has sampled for all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from rloo_fast.records import Prompt, Rollout
from rloo_fast.step.collect import GivenByRewards, Scored
from rloo_fast.step.shares import share_of


def test_rows_are_those_that_every_process_has_and_are_not_sent(monkeypatch):
    rows = [Prompt(f"{i}", [i], {}) for i in range(4)]
    ids = [[5], [6, 7], [8], [9]]
    rollout = Rollout(ids, ["stop"] * 4, None)
    given = GivenByRewards({"note": ["a", "b", "c", "d"], "odd": [1]}, {"metric": [1.0]})
    scored = Scored(rows, rollout, torch.arange(4.0).view(4, 1), list("wxyz"), given)
    sent: list[Any] = []

    def gathered(_: Any, mine: Any) -> list[Any]:
        sent.append(mine)
        return [sent[0], None]

    monkeypatch.setattr("rloo_fast.step.shares.gather_objects", gathered)
    shares = []
    for rank, mine in enumerate((scored, None)):
        accelerator: Any = SimpleNamespace(
            num_processes=2, process_index=rank, is_main_process=rank == 0
        )
        shares.append(share_of(mine, rows, accelerator))
    assert not sent[0].rows
    assert [share.rows for share in shares] == [rows[:2], rows[2:]]
    assert [share.rollout.completion_ids for share in shares] == [ids[:2], ids[2:]]
    assert [share.given.extra for share in shares] == [{"note": ["a", "b"]}, {"note": ["c", "d"]}]
    assert [share.given.logged for share in shares] == [{"metric": [1.0]}, {}]
    assert shares[1].rewards.tolist() == [[2.0], [3.0]]
