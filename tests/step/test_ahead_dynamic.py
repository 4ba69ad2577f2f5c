"""Groups without signal are replaced while completions are sampled ahead of their step."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from datasets import Dataset

from rloo_fast.data.ledger import Fate
from tests.step.test_ahead import ahead, prompts_of
from tests.support.kill_ahead import ENGINE, PROMPTS, K, ledger_counts

STEPS = 8
# more than a run draws: a prompt that comes twice was drawn twice
MANY = Dataset.from_list([{"prompt": f"{a} w{i}"} for a in PROMPTS for i in range(4)])


def odd_or_even(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text.split()) % 2) for text in completions]


def run(path: Any, bound: int, reward: Any = odd_or_even, **settings: Any) -> Any:
    given = {"train_dataset": MANY, "dynamic_sampling": True, "max_completion_length": 6}
    return ahead(path, bound, reward, **{**given, "max_steps": STEPS, **settings})


def fates(trainer: Any) -> Counter[Fate]:
    return Counter({fate: n for fate, n in trainer.source.stream.ledger.counts().items() if n})


@pytest.mark.parametrize("bound", [1, 2, 4])
def test_every_group_teaches_no_token_is_too_old_and_no_prompt_comes_twice(bound, tmp_path):
    trainer = run(tmp_path, bound)
    trainer.train()
    for batch in trainer.trained:
        assert batch.rows.reward.view(-1, K).std(1).gt(0).all()
    lags = torch.cat([batch.staleness for batch in trainer.trained])
    assert 0 < lags.max() <= bound
    counts = Counter(prompts_of(trainer))
    assert set(counts.values()) == {K}
    assert len(counts) == fates(trainer)[Fate.TRAINED] == 2 * STEPS
    assert fates(trainer)[Fate.REPLACED] > 0
    logs = [row for row in trainer.state.log_history if "dynamic/rounds" in row]
    sampled = sum(row["dynamic/generated_per_used"] for row in logs) * 2
    final = fates(trainer)[Fate.TRAINED] + fates(trainer)[Fate.REPLACED]
    twice = sampled - final - len(trainer.source.ready)  # groups that were over age
    assert 0 <= twice <= sum(row["async/sampled_again"] for row in logs) / K


def test_where_every_group_teaches_prompts_come_as_without(tmp_path):
    def first_is_right(completions: list[str], **_: Any) -> list[float]:
        return [float(i % K == 0) for i in range(len(completions))]

    settings = {"overlap_rewards": False, "shuffle_dataset": False}
    replaced = run(tmp_path / "a", 2, first_is_right, **settings)
    replaced.train()
    plain = run(tmp_path / "b", 2, first_is_right, dynamic_sampling=False, **settings)
    plain.train()
    assert prompts_of(replaced) == prompts_of(plain)
    assert {row["dynamic/rounds"] for row in replaced.state.log_history if "reward" in row} == {1.0}


def test_more_signal_than_expected_is_sampled_again_rather_than_trained_too_old(tmp_path):
    """Of rounds that were asked for while hardly a group had signal, suddenly all have."""
    seen = []

    def later(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        seen.append(trainer_state.global_step)
        if trainer_state.global_step < 3 and len(seen) % 4:
            return [0.0] * len(completions)
        return [float(i % K) for i in range(len(completions))]

    trainer = run(tmp_path, 1, later, max_sampling_rounds=8)
    trainer.train()
    lags = torch.cat([batch.staleness for batch in trainer.trained])
    assert lags.max() <= 1
    logs = [row for row in trainer.state.log_history if "dynamic/rounds" in row]
    assert sum(row["async/sampled_again"] for row in logs) > 0
    counts = Counter(prompts_of(trainer))
    assert set(counts.values()) == {K}


def test_a_resumed_run_goes_on_with_the_groups_that_wait(tmp_path):
    first = run(tmp_path, 2, max_steps=4, save_strategy="steps", save_steps=4)
    first.train()
    counts = ledger_counts(tmp_path)
    assert counts["TRAINED"] == 8
    waiting = [group.number for group in first.source.ready]
    resumed = run(tmp_path, 2)
    resumed.train(resume_from_checkpoint=True)
    trained = Counter(prompts_of(first) + prompts_of(resumed))
    assert set(trained.values()) == {K}
    assert len(trained) == 2 * STEPS
    ledger = resumed.source.stream.ledger
    assert all(ledger.fate(number) is Fate.TRAINED for number in waiting)
    assert max(batch.staleness.max() for batch in resumed.trained) <= 2


def test_a_filter_is_asked_about_the_prompts_of_its_round(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def keep(group):\n    return group.prompt.startswith(('w0', 'w1', 'w2', 'w3'))\n"
    )
    trainer = run(tmp_path, 2, rollout_filter=f"{tmp_path / 'mine.py'}:keep", max_steps=4)
    trainer.train()
    texts = trainer.processing_class.batch_decode(
        [ids for batch in trainer.trained for ids in batch.prompt_ids]
    )
    assert {text.split()[0] for text in texts} <= {"w0", "w1", "w2", "w3"}


def test_a_curriculum_alone_takes_every_round_whole(tmp_path):
    trainer = run(tmp_path, 2, dynamic_sampling=False, curriculum=0.5)
    trainer.train()
    assert len(set(prompts_of(trainer))) == 2 * STEPS
    logs = [row for row in trainer.state.log_history if "dynamic/rounds" in row]
    assert {row["dynamic/generated_per_used"] for row in logs} == {1.0}
    assert max(batch.staleness.max() for batch in trainer.trained) > 0


@pytest.fixture
def not_for_ever() -> Iterator[None]:
    """What waits for ever fails."""

    def ended(*_: Any) -> None:
        raise TimeoutError("it waits for what does not come")

    before = signal.signal(signal.SIGALRM, ended)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("not_for_ever")
def test_a_round_for_a_later_batch_gets_weights_that_are_new_enough(tmp_path):
    """With groups that wait, the next round may end in the batch behind its own: from weights that
    are `max_staleness` old by now, as `weight_sync_steps` leaves them, it would never start."""

    def most_teach(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text) % 7) for text in completions]

    settings = {"weight_sync_steps": 2, "per_device_train_batch_size": 16, "max_steps": 6}
    trainer = run(tmp_path, 1, most_teach, **settings)
    trainer.train()
    assert max(batch.staleness.max() for batch in trainer.trained) <= 1


def test_rounds_behind_a_batch_that_stays_short_are_not_begun_too_early(tmp_path):
    def nothing_teaches(completions: list[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    engine = ENGINE.replace("SlowCopiedEngine", "CopiedEngine")
    given = {"max_sampling_rounds": 2, "rollout_engine": engine}
    trainer = run(tmp_path, 1, nothing_teaches, **given)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "dynamic/rounds" in row]
    assert {row["dynamic/rounds"] for row in logs} == {2.0}
    # the first rounds are drawn when every prompt is expected to teach
    assert sum(row["async/sampled_again"] for row in logs[2:]) == 0


def test_what_comes_behind_a_whole_batch_is_trained_later_however_little_teaches(tmp_path):
    rounds = run(tmp_path, 1).source.rounds
    assert [rounds.steps_until(ahead, 2, 0.1) for ahead in (0, 9, 10)] == [1, 1, 2]
    assert [rounds.steps_until(ahead, 1, 0.5) for ahead in (0, 1, 2)] == [0, 1, 1]
