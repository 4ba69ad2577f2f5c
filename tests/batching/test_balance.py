"""Rows between processes: nothing lost, nothing mixed up, and equal work."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from rloo_fast.batching import balance
from rloo_fast.batching.layouts import LAYOUTS
from rloo_fast.record_rows import per_row, per_token
from rloo_fast.records import GenerationBatch, RolloutRows
from tests.support.batches import generation_batch

K = 3


def make_batch(rank: int, lengths: list[int], kind: type = GenerationBatch, **extra):
    """One group of K rows per length; every value of a row names the row."""
    first = rank * len(lengths) * K
    rows = torch.arange(first, first + len(lengths) * K)
    counted = [n + i for n in lengths for i in range(K)]
    named = rows.float()
    made = generation_batch(
        prompt_ids=[[1000 + int(row) // K] * 4 for row in rows],
        completion_ids=[[int(row)] * n for row, n in zip(rows, counted, strict=True)],
        groups=(rows // K).tolist(),
        scores=named / 7,
        rows=RolloutRows(
            row=rows,
            length=torch.tensor(counted),
            truncated=rows % 2 == 0,
            rewards=torch.stack([named, -named], 1),
            reward=2 * named,
        ),
        num_generations=K,
        sampler_logps=-named.repeat_interleave(torch.tensor(counted)),
        token_versions=row_versions(rows.tolist(), counted),
        weights_version=9 + rank,
    )
    values = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
    return kind(**values, **{name: make(rows, counted) for name, make in extra.items()})


def row_versions(rows: list[int], counted: list[int]) -> torch.Tensor:
    """Of each row's tokens: the first half by version row % 5, the rest by the one after it."""
    halves = [
        [row % 5 + (t >= n // 2) for t in range(n)] for row, n in zip(rows, counted, strict=True)
    ]
    return torch.tensor([version for half in halves for version in half], dtype=torch.int32)


def exchanged(monkeypatch, ranks):
    """What each of the ranks with these batches ends up with."""

    def gather(accelerator, mine):
        assert mine is ranks[accelerator.process_index]
        return ranks

    monkeypatch.setattr(balance, "gather_objects", gather)
    return [
        balance.balance_rows(
            batch,
            cast(Any, SimpleNamespace(num_processes=len(ranks), process_index=rank)),
            layout=LAYOUTS["shared_prefix"],
            tokens_per_pair=100.0,
        )
        for rank, batch in enumerate(ranks)
    ]


def test_every_row_ends_up_on_one_process_with_all_that_is_its_own(monkeypatch):
    ranks = [make_batch(0, [5, 90, 80]), make_batch(1, [3, 4, 2])]
    got = exchanged(monkeypatch, ranks)
    assert sorted(int(row) for batch in got for row in batch.rows.row) == list(range(18))
    for batch in got:
        assert batch.num_rows == 9
        assert batch.whole_groups
        for i, row in enumerate(batch.rows.row.tolist()):
            assert batch.prompt_ids[i] == [1000 + row // K] * 4
            assert set(batch.completion_ids[i]) == {row}
            assert batch.num_tokens[i] == len(batch.completion_ids[i])
            assert batch.rows.length[i] == len(batch.completion_ids[i])
            assert batch.rows.rewards[i].tolist() == [row, -row]
            assert batch.scores[i] == pytest.approx(row / 7)
            assert batch.groups[i] == row // K
            own = batch.sampler_logps[batch.token_index([i])]
            assert own.tolist() == [-row] * batch.num_tokens[i]
        rows = batch.rows.row.tolist()
        assert torch.equal(batch.token_versions, row_versions(rows, batch.num_tokens))
        assert batch.weights_version == 10  # the newest: staleness is counted from there
        assert batch.stale_rows.all()


@dataclasses.dataclass(frozen=True, eq=False)
class LaterBatch(GenerationBatch):
    """A batch of a later version: fields that nothing but their declaration knows of."""

    labels: list[str] = per_row(default_factory=list)
    weights: torch.Tensor = per_token(default=None)


def test_a_new_field_arrives_with_its_rows(monkeypatch):
    new = {
        "labels": lambda rows, counted: [f"row {row}" for row in rows.tolist()],
        "weights": lambda rows, counted: rows.repeat_interleave(torch.tensor(counted)),
    }
    ranks = [make_batch(rank, [5, 90], LaterBatch, **new) for rank in range(2)]
    got = exchanged(monkeypatch, ranks)
    assert sorted(label for batch in got for label in batch.labels) == sorted(
        f"row {row}" for row in range(12)
    )
    for batch in got:
        assert batch.labels == [f"row {row}" for row in batch.rows.row.tolist()]
        owners = batch.rows.row.repeat_interleave(torch.tensor(batch.num_tokens))
        assert torch.equal(batch.weights, owners)


def test_a_field_that_only_some_batches_have_is_not_lost(monkeypatch):
    ranks = [
        make_batch(0, [5, 90]),
        dataclasses.replace(make_batch(1, [3, 4]), token_versions=None),
    ]
    with pytest.raises(AssertionError, match="token_versions: some batches have none"):
        exchanged(monkeypatch, ranks)


def test_without_log_probs_of_the_sampler_there_are_none_after(monkeypatch):
    ranks = [
        dataclasses.replace(make_batch(rank, lengths), sampler_logps=None)
        for rank, lengths in enumerate(([5, 90], [3, 4]))
    ]
    assert all(batch.sampler_logps is None for batch in exchanged(monkeypatch, ranks))


def test_groups_stay_whole_and_work_becomes_equal(monkeypatch):
    def work(batch):
        starts = range(0, batch.num_rows, K)
        lengths = [batch.num_tokens[s : s + K] for s in starts]
        layout = LAYOUTS["shared_prefix"]
        return sum(layout.cost(4, ls, tokens_per_pair=100.0) for ls in lengths)

    ranks = [make_batch(0, [50, 90, 80, 70]), make_batch(1, [3, 4, 2, 5])]
    got = exchanged(monkeypatch, ranks)
    for batch in got:
        assert batch.groups == [g for g in batch.groups[::K] for _ in range(K)]
    before, after = ([work(b) for b in batches] for batches in (ranks, got))
    assert max(before) > 10 * min(before)
    assert max(after) < 1.2 * min(after)


@pytest.mark.parametrize(("processes", "whole"), [(1, True), (2, False)])
def test_nothing_is_sent_by_one_process_or_with_split_groups(processes, whole, monkeypatch):
    monkeypatch.setattr(balance, "gather_objects", None)
    batch = dataclasses.replace(make_batch(0, [1, 2]), whole_groups=whole)
    accelerator: Any = SimpleNamespace(num_processes=processes, process_index=0)
    layout = LAYOUTS["packed"]
    got = balance.balance_rows(batch, accelerator, layout=layout, tokens_per_pair=1.0)
    assert got is batch
