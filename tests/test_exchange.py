"""Rows between processes: nothing lost, nothing mixed up, and equal work."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rloo_fast import exchange
from rloo_fast.packing import group_cost
from rloo_fast.types import Samples

K = 3


def make_samples(rank: int, lengths: list[int]) -> Samples:
    """One group of K rows per length; every value of a row names the row."""
    first = rank * len(lengths) * K
    rows = torch.arange(first, first + len(lengths) * K)
    counted = torch.tensor([n + i for n in lengths for i in range(K)])
    return Samples(
        prompt_ids=[[1000 + int(row) // K] * 4 for row in rows],
        completion_ids=[[int(row)] * int(n) for row, n in zip(rows, counted, strict=True)],
        cu_seqlens=torch.cat([counted.new_zeros(1), counted.cumsum(0)]),
        scores=rows.float() / 7,
        num_generations=K,
        groups=(rows // K).tolist(),
        whole_groups=True,
        stats={"row": rows, "length": counted},
        sampler_logps=-rows.float().repeat_interleave(counted),
    )


@pytest.fixture
def exchanged(monkeypatch):
    """What each of the ranks with these samples ends up with."""

    def run(ranks: list[Samples]) -> list[Samples]:
        keys = (*exchange.PER_ROW, *exchange.TENSORS, "num_tokens")
        sent = [{key: getattr(samples, key) for key in keys} for samples in ranks]

        def gather(mine):
            assert mine[0]["groups"] in [one["groups"] for one in sent]
            return sent

        monkeypatch.setattr(exchange, "gather_object", gather)
        return [
            exchange.balance_rows(
                samples,
                SimpleNamespace(num_processes=len(ranks), process_index=rank),  # pyright: ignore
                layout="shared_prefix",
                tokens_per_pair=100.0,
            )
            for rank, samples in enumerate(ranks)
        ]

    return run


def test_every_row_ends_up_on_one_process_with_all_that_is_its_own(exchanged):
    got = exchanged([make_samples(0, [5, 90, 80]), make_samples(1, [3, 4, 2])])
    assert sorted(int(row) for s in got for row in s.stats["row"]) == list(range(18))
    for samples in got:
        assert samples.num_rows == 9
        assert samples.whole_groups
        for i, row in enumerate(samples.stats["row"].tolist()):
            assert samples.prompt_ids[i] == [1000 + row // K] * 4
            assert set(samples.completion_ids[i]) == {row}
            assert samples.num_tokens[i] == len(samples.completion_ids[i])
            assert samples.stats["length"][i] == len(samples.completion_ids[i])
            assert samples.scores[i] == pytest.approx(row / 7)
            assert samples.groups[i] == row // K
            own = samples.sampler_logps[samples.token_index([i])]
            assert own.tolist() == [-row] * samples.num_tokens[i]


def test_without_log_probs_of_the_sampler_there_are_none_after(exchanged):
    ranks = [make_samples(0, [5, 90]), make_samples(1, [3, 4])]
    for samples in ranks:
        samples.sampler_logps = None
    assert all(samples.sampler_logps is None for samples in exchanged(ranks))


def test_groups_stay_whole_and_work_becomes_equal(exchanged):
    def work(samples):
        starts = range(0, samples.num_rows, K)
        lengths = [samples.num_tokens[s : s + K] for s in starts]
        return sum(group_cost(4, ls, "shared_prefix", tokens_per_pair=100.0) for ls in lengths)

    ranks = [make_samples(0, [50, 90, 80, 70]), make_samples(1, [3, 4, 2, 5])]
    got = exchanged(ranks)
    for samples in got:
        assert samples.groups == [g for g in samples.groups[::K] for _ in range(K)]
    before, after = ([work(s) for s in samples] for samples in (ranks, got))
    assert max(before) > 10 * min(before)
    assert max(after) < 1.2 * min(after)


@pytest.mark.parametrize(("processes", "whole"), [(1, True), (2, False)])
def test_nothing_is_sent_by_one_process_or_with_split_groups(processes, whole, monkeypatch):
    monkeypatch.setattr(exchange, "gather_object", None)
    samples = make_samples(0, [1, 2])
    samples.whole_groups = whole
    accelerator = SimpleNamespace(num_processes=processes, process_index=0)
    got = exchange.balance_rows(samples, accelerator, layout="packed", tokens_per_pair=1.0)  # pyright: ignore
    assert got is samples
