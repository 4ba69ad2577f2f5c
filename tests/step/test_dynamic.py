"""Batches of groups with signal: what they cost, which groups they take, and exact states."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState

from benchmarks.dynamic_sampling.scripted import ScriptedCollector, scripted_source
from rloo_fast.data.ledger import Fate
from rloo_fast.data.seeds import step_seed
from rloo_fast.records import CompletionTexts, GenerationBatch, Prompt, RolloutRows
from rloo_fast.rewards.shaping import ScoreSettings, SoftPunish
from rloo_fast.step.group_filter import GroupFilter
from rloo_fast.step.groups import Group, has_signal
from rloo_fast.step.source import LoaderSource

NAN = float("nan")


def batches(source, first, last):
    return [source.next([], step_seed(7, n), TrainerState()) for n in range(first, last)]


def group(rewards, lengths=None, truncated=None, counted=None):
    n = len(rewards)
    lengths = lengths or [4] * n
    reward = torch.tensor(rewards)
    return GenerationBatch(
        prompt_ids=[[1]] * n,
        completion_ids=[[2] * length for length in lengths],
        num_tokens=lengths if counted is None else counted,
        groups=[0] * n,
        scores=reward,
        rows=RolloutRows(
            row=torch.arange(n),
            length=torch.tensor(lengths),
            truncated=torch.tensor(truncated or [False] * n),
            rewards=reward[:, None],
            reward=reward,
        ),
        num_generations=n,
    )


@pytest.mark.parametrize("p", [0.1, 0.3, 0.7, 1.0])
def test_a_batch_costs_no_more_than_one_over_p(p):
    """Every accepted group is trained or waits; and there are about as many prompts as 1/p says."""
    source, size = scripted_source(p, prompts_per_batch=16), 16
    logs = [one.logged for one in batches(source, 0, 60)]
    sampled = sum(log["dynamic/generated_per_used"] for log in logs) * size
    accepted = sum(
        round(log["dynamic/acceptance"] * log["dynamic/generated_per_used"] * size) for log in logs
    )
    used = 60 * size
    assert accepted == used + len(source.ready)
    assert len(source.ready) < size
    deviation = (1 - p) ** 0.5 / used**0.5  # of sampled p / used
    assert abs(sampled * p / used - 1) <= 3 * deviation + size / used
    assert all(log["dynamic/without_signal"] == 0 for log in logs)
    if p == 1:
        assert all(log["dynamic/rounds"] == 1 for log in logs)


def test_every_group_of_a_batch_has_signal_and_prompts_come_in_order():
    source = scripted_source(0.4, prompts_per_batch=5)
    for collected in batches(source, 0, 20):
        assert collected.batch.rows.reward.view(5, 2).std(1).gt(0).all()
        assert collected.batch.groups == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        assert collected.batch.rows.row.tolist() == list(range(10))
    counts, waiting = source.stream.ledger.counts(), [one.number for one in source.ready]
    assert counts[Fate.TRAINED] == 100
    assert counts[Fate.QUEUED] == len(waiting)
    assert counts[Fate.IN_FLIGHT] == 0
    assert source.stream.ledger.unfinished() == waiting == sorted(waiting)


@pytest.mark.parametrize("stopped", [0, 1, 7])
def test_a_loaded_source_goes_on_with_the_same_batches(stopped):
    def facts(some):
        return [
            (one.batch.rows.reward.tolist(), one.batch.weights_version, one.logged) for one in some
        ]

    source = scripted_source(0.3, prompts_per_batch=6)
    batches(source, 0, stopped)
    state = source.state_dict()
    resumed = scripted_source(0.3, prompts_per_batch=6)
    resumed.load_state_dict(state)
    assert facts(batches(resumed, stopped, 12)) == facts(batches(source, stopped, 12))


def test_groups_that_waited_keep_their_age_over_a_resume():
    source = scripted_source(0.5, prompts_per_batch=8)
    version = 4
    source.collector.rollouts = SimpleNamespace(version=lambda: version)
    without = source.collector.without_scores

    def stamped(scored, k):
        batch = without(scored, k)
        versions = torch.full((batch.num_rows,), version, dtype=torch.int32)
        return replace(batch, token_versions=versions, weights_version=version)

    source.collector.without_scores = stamped
    while not source.ready:
        batches(source, version, version + 1)
        version += 1
    ages = [version - one.batch.token_versions for one in source.ready]
    assert all((age == 1).all() for age in ages)
    state, version = source.state_dict(), 1  # a resumed process counts anew
    source.load_state_dict(state)
    assert all((version - one.batch.token_versions == 1).all() for one in source.ready)
    (collected,) = batches(source, 99, 100)
    assert collected.batch.weights_version == 1
    assert set(collected.batch.staleness.tolist()) == {0, 1}


def test_after_the_last_round_the_batch_is_trained_as_it_is(caplog):
    source = scripted_source(0.0, prompts_per_batch=4, max_rounds=3)
    with caplog.at_level(logging.WARNING):
        (collected,) = batches(source, 0, 1)
    assert "0 of 4 groups that have signal: max_sampling_rounds=3 rounds of sampling, 12" in (
        caplog.text
    )
    assert collected.batch.rows.reward.tolist() == [1.0] * 8
    assert collected.logged["dynamic/without_signal"] == 4
    ledger = source.stream.ledger
    assert [ledger.fate(n) for n in range(12)] == [Fate.REPLACED] * 8 + [Fate.TRAINED] * 4


def test_groups_that_waited_are_not_taken_into_batches_of_another_size():
    source = scripted_source(0.5, prompts_per_batch=8)
    while not source.ready:
        batches(source, 0, 1)
    state = source.state_dict()
    for name, value in (("num_generations", 4), ("prompts of a generation batch", 2)):
        other = scripted_source(0.5, prompts_per_batch=8)
        if name == "num_generations":
            other.num_generations = value
        else:
            other.prompts_per_batch = value
        with pytest.raises(ValueError, match=f"with {name} = ., but now it is {value}: resume"):
            other.load_state_dict(state)


def test_a_state_of_another_kind_of_source_is_refused():
    stream, rows = scripted_source(1.0, prompts_per_batch=2), LoaderSource(ScriptedCollector(1), 2)
    with pytest.raises(ValueError, match="of a run with dynamic_sampling or curriculum, this one"):
        rows.load_state_dict(stream.state_dict())
    for old in (rows.state_dict(), {}):  # {}: of a version with one kind
        with pytest.raises(ValueError, match="of a run with none of dynamic_sampling"):
            stream.load_state_dict(old)
    rows.load_state_dict({})


@pytest.mark.parametrize(
    ("rewards", "settings", "expected"),
    [
        ([0.0, 1.0], {}, True),
        ([1.0, 1.0, 1.0], {}, False),
        ([NAN, 1.0], {}, False),
        ([NAN, 1.0, 1.0], {}, False),
        ([NAN, 1.0, 0.5], {}, True),
        ([3.0, 7.0], {"clip_range": [-1.0, 1.0]}, False),
        ([3.0, 7.0], {"clip_range": [-1.0, 1.0], "normalize": True}, True),
        ([3.0, 3.0], {"normalize": True}, False),
    ],
)
def test_a_group_has_signal_if_its_scores_differ(rewards, settings, expected):
    assert has_signal(group(rewards), ScoreSettings(**settings)) == expected


def test_penalties_of_length_are_signal_and_masked_rows_are_not():
    equal = group([1.0, 1.0], lengths=[3, 8], truncated=[False, True])
    assert not has_signal(equal, ScoreSettings())
    assert has_signal(equal, ScoreSettings(missing_eos_penalty=0.5))
    assert has_signal(equal, ScoreSettings(soft_punish=SoftPunish(8, 2)))
    assert not has_signal(equal, ScoreSettings(soft_punish=SoftPunish(20, 2)))
    assert not has_signal(group([0.0, 1.0], counted=[0, 0]), ScoreSettings())
    assert has_signal(group([0.0, 1.0], counted=[0, 4]), ScoreSettings())


def asked(function):
    accelerator = SimpleNamespace(is_main_process=True, num_processes=1)
    texts = CompletionTexts(["2 + 2 ="] * 2, ["4", "5"], {"exact": [1.0, 0.0]}, {})
    prompt = Prompt("2 + 2 =", [1], {"answer": "4"})
    keep = GroupFilter(function, "mine:keep", accelerator)
    return keep.everywhere(keep.here([Group(3, group([1.0, 0.0], [1, 2]), texts)], [prompt]))


def test_a_filter_sees_the_group():
    seen = []

    def keep(group):
        seen.append(group)
        return group.lengths[1] < 2

    assert asked(keep) == [False]
    (one,) = seen
    assert (one.prompt, one.columns, one.completions) == ("2 + 2 =", {"answer": "4"}, ["4", "5"])
    assert (one.rewards, one.reward) == ({"exact": [1.0, 0.0]}, [1.0, 0.0])
    assert (one.lengths, one.truncated) == ([1, 2], [False, False])
    assert one.completion_ids == [[2], [2, 2]]


def test_a_filter_that_fails_is_named_with_the_group():
    def broken(group):
        return group.columns["missing"]

    with pytest.raises(
        ValueError, match=r"'mine:keep' on the group of prompt '2 \+ 2 =' failed: Ke"
    ):
        asked(broken)
    with pytest.raises(ValueError, match=r"must return True .keep it. or False, got 0.5"):
        asked(lambda group: 0.5)


def test_groups_turned_down_by_a_filter_train_last_and_with_nothing_to_compare():
    source = scripted_source(0.5, prompts_per_batch=4, max_rounds=2)
    source.keep = SimpleNamespace(
        here=lambda groups, prompts: [one.number == 0 for one in groups], everywhere=list
    )
    source.collector.failing_together = lambda: torch.no_grad()  # any context
    source.collector.tokenize = list
    (collected,) = batches(source, 0, 1)
    rewards = collected.batch.rows.reward.view(4, 2)
    assert not rewards[0].isnan().any()
    assert rewards[1:].isnan().all()
    fates = [source.stream.ledger.fate(n) for n in range(8)]
    assert fates.count(Fate.TRAINED) == 4
    assert fates[0] == Fate.TRAINED
