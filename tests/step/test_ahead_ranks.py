"""Batches sampled ahead on two processes: the main one samples, each trains its share."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.step.test_ahead import STEPS
from tests.support.ahead_worker import CASES
from tests.support.kill_ahead import K
from tests.support.launch import run_worker_processes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """case -> what each rank trained and ended with."""
    out = tmp_path_factory.mktemp("ranks")
    done = run_worker_processes("ahead_worker", str(out))
    assert done.returncode == 0, done.stderr[-4000:]
    return {case: [_read(out / case / f"{rank}.json") for rank in (0, 1)] for case in CASES}


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def rows_of(ranks: list[Any]) -> list[Any]:
    """(step, prompt, completion, reward), of all processes."""
    found = []
    for rank in ranks:
        for step, (prompts, completions, rewards, _) in enumerate(rank["trained"]):
            found += [(step, *row) for row in zip(prompts, completions, rewards, strict=True)]
    return sorted(found)


def test_both_processes_get_equal_shares_and_stay_the_same_model(runs):
    for ranks in runs.values():
        assert ranks[0]["head"] == ranks[1]["head"]
        sizes = {len(batch[0]) for rank in ranks for batch in rank["trained"]}
        assert sizes == {4}


def test_at_bound_0_completions_and_rewards_are_those_of_the_loader(runs):
    assert rows_of(runs["bound 0"]) == rows_of(runs["loader"])


def test_ahead_each_prompt_is_trained_once_and_no_token_is_too_old(runs):
    ranks = runs["bound 2"]
    counts = Counter(tuple(prompt) for _, prompt, _, _ in rows_of(ranks))
    assert set(counts.values()) == {K}
    assert len(counts) == 4 * STEPS // 2
    lags = [batch[3] for rank in ranks for batch in rank["trained"]]
    assert 0 < max(lags) <= 2


def test_groups_are_replaced_on_both_processes_alike(runs):
    ranks = runs["replaced"]
    rewards: dict[Any, set[float]] = {}
    for step, prompt, _, reward in rows_of(ranks):
        rewards.setdefault((step, tuple(prompt)), set()).add(reward)
    assert len(rewards) == len({prompt for _, prompt in rewards}) == 4 * STEPS // 2
    assert set(map(len, rewards.values())) == {2}, "every group has signal"
    assert max(batch[3] for rank in ranks for batch in rank["trained"]) <= 2
