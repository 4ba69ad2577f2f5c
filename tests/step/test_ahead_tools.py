"""Conversations with tools that are sampled ahead of their step, and the environments they hold."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from datasets import Dataset

from rloo_fast import RLOOConfig, RLOOTrainer
from rloo_fast.checkpoint.files import checkpoints
from rloo_fast.records import Rollout, Strand, Trajectory
from rloo_fast.rollout.ahead.requests import rollout_of, sampled_of
from rloo_fast.step import build, loaders
from rloo_fast.tools.run_tools import EnvironmentFailed
from tests.rollout.trajectories.test_runs import noise_model
from tests.support.chats import echo, noise_tokenizer
from tests.support.interrupted import assert_same_but_for_the_queue
from tests.support.kill_ahead import ENGINE, ledger_counts

K, STEPS = 2, 6
ROWS = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": f"question {i} ?"}], "n": i} for i in range(2 * STEPS)]
)


class Room:
    """An environment that a trajectory says words to."""

    made: ClassVar[list[Room]] = []
    fails_at: ClassVar[int | None] = None

    def __init__(self) -> None:
        self.n, self.heard = -1, list[str]()
        self.made.append(self)

    def reset(self, n: int, **row: Any) -> str:
        if n == self.fails_at:
            raise OSError("the room is locked")
        self.n, self.heard = n, []
        return f" It is room {n}."

    def echo(self, word: str) -> str:
        """
        Say how long a word is.

        Args:
            word: any
        """
        self.heard.append(word)
        return f"{len(word)} of"

    def get_reward(self) -> float:
        return float(sum(map(len, self.heard)))


@pytest.fixture(autouse=True)
def rooms(monkeypatch):
    monkeypatch.setattr(Room, "made", [])
    return Room.made


def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 5) for ids in completion_ids]


def make(output_dir: Path, reward: Any = even, data: Any = ROWS, **settings: Any) -> Any:
    """A trainer; `trained`: what each step took; `scored`: all that was sampled for it."""
    given: dict[str, Any] = {
        "per_device_train_batch_size": 2 * K, "num_generations": K, "max_completion_length": 24,
        "max_steps": STEPS, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "beta": 0.0,
        "gradient_checkpointing": False, "bf16": False, "logp_diff_stop": 1e-3, **settings,
    }  # fmt: skip
    tokenizer = noise_tokenizer()
    where = {
        name: given.pop(name) for name in ("tools", "environment_factory") if name in given
    } or {"tools": [echo]}
    trainer: Any = RLOOTrainer(
        noise_model(tokenizer),
        reward,
        RLOOConfig(str(output_dir), **given),
        data,
        processing_class=tokenizer,
        **where,
    )
    trainer.scored = []
    collected = trainer.collector.without_scores

    def noted(scored: Any, *args: Any) -> Any:
        trainer.scored.append(scored)
        return collected(scored, *args)

    trainer.collector.without_scores = noted
    collect, trainer.trained = trainer.source.next, []

    def took(*args: Any) -> Any:
        trainer.trained.append(collect(*args))
        return trainer.trained[-1]

    trainer.source.next = took
    return trainer


def ahead(output_dir: Path, max_staleness: int, *args: Any, **settings: Any) -> Any:
    given = {"rollout_engine": ENGINE, "max_staleness": max_staleness, **settings}
    return make(output_dir, *args, **given)


def numbers_of(trainer: Any) -> Counter[int]:
    return Counter(row.columns["n"] for scored in trainer.scored for row in scored.rows)


def trajectories_of(trainer: Any) -> list[Any]:
    return [one for scored in trainer.scored for one in scored.rollout.trajectories]


# Bound 0


@pytest.mark.parametrize(
    "settings", [{}, {"environment_factory": Room}], ids=["tools", "environments"]
)
def test_with_bound_0_weights_and_metrics_are_those_of_the_synchronous_run(
    settings, tmp_path, monkeypatch
):
    settings = {"max_steps": 3, **settings}
    synchronous = make(tmp_path / "synchronous", **settings)
    synchronous.train()
    for module in (build, loaders):
        monkeypatch.setattr(module, "samples_ahead", lambda args: True)
    queued = make(tmp_path / "queued", **settings)
    assert type(queued.source) is not type(synchronous.source)
    queued.train()
    assert max(one.num_turns for one in trajectories_of(queued)) > 1
    assert trajectories_of(queued) == [
        # what was waited for is time
        one.__class__(**{**vars(one), "seconds": other.seconds})
        for one, other in zip(trajectories_of(synchronous), trajectories_of(queued), strict=True)
    ]
    assert_same_but_for_the_queue(synchronous, queued)


# The bound


@pytest.mark.parametrize(
    ("bound", "settings"),
    [
        (1, {}),
        (3, {"environment_factory": Room}),
        (2, {"rollout_engine": ENGINE.replace("SlowCopiedEngine", "CopiedCalls")}),
        (2, {"environment_factory": Room, "dynamic_sampling": True, "beta": 0.01}),
    ],
    ids=["tools", "environments", "whole calls", "dynamic sampling"],
)
def test_no_token_is_older_than_the_bound_and_is_trained_as_it_was_sampled(
    bound, settings, tmp_path
):
    trainer = ahead(tmp_path, bound, **settings)
    trainer.train()
    lags = torch.cat([one.batch.staleness for one in trainer.trained])
    assert lags.min() == 0
    assert 0 < lags.max() <= bound
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert max(log.get("sampling/logp_diff_max", 0) for log in logs) < 1e-4  # where it is young
    assert max(one.num_turns for one in trajectories_of(trainer)) > 1
    assert all(log["tools/turns"] >= 1 for log in logs)
    if "dynamic_sampling" not in settings:
        assert set(numbers_of(trainer).values()) == {K}
        assert len(numbers_of(trainer)) == len(ROWS)


def test_a_trajectory_has_its_environment_until_it_is_scored_and_then_another_has_it(
    tmp_path, rooms
):
    seen: list[Any] = []

    def looks(
        prompts: list[Any], completions: list[Any], environments: list[Room], n: list[int], **_
    ):
        for prompt, messages, room, number in zip(
            prompts, completions, environments, n, strict=True
        ):
            assert prompt[-1]["content"] == f"question {number} ? It is room {number}."
            said = [m["content"] for m in messages if m["role"] == "tool"]
            # a last answer may not have fit
            assert said == [f"{len(word)} of" for word in room.heard][: len(said)]
            seen.append((number, room))
            assert room.n == number
        return [1.0 * len(room.heard) for room in environments]

    trainer = ahead(tmp_path, 2, looks, environment_factory=Room)
    trainer.train()
    assert len(seen) == K * len(ROWS)
    assert all(len({id(room) for n, room in seen if n == i}) == K for i in range(len(ROWS)))
    # one to look at, and those of the batches that are under way
    assert len(rooms) <= 1 + 2 * K * (2 + 2) < K * len(ROWS)
    rewards = torch.cat([scored.rewards for scored in trainer.scored])
    assert rewards.shape == (K * len(ROWS), 2)
    rows = [row for scored in trainer.scored for row in scored.rows]
    tokenizer = trainer.processing_class
    assert all(f"room {row.columns['n']}." in tokenizer.decode(row.ids) for row in rows)


# Ends


def stopped(tmp_path: Path, **settings: Any) -> Any:
    """A run ahead that was told to end after two steps."""
    trainer = ahead(tmp_path, 2, **settings)
    collect = trainer.source.next

    def terminated(*args: Any) -> Any:
        collected = collect(*args)
        trainer.termination.requested = trainer.source.rounds.number == 2
        return collected

    trainer.source.next = terminated
    with pytest.raises(SystemExit):
        trainer.train()
    assert trainer.state.global_step == 2
    return trainer


def test_conversations_that_wait_for_their_step_are_kept_in_a_checkpoint(tmp_path):
    before = stopped(tmp_path)
    state = torch.load(checkpoints(tmp_path)[-1] / "rloo_state_0.pt", weights_only=True)["source"]
    kept = [
        row for batch in state["batches"] for rows in batch["found"] or [] for row in rows if row
    ]
    assert kept, "nothing was there when it ended"
    after = ahead(tmp_path, 2)
    after.train(resume_from_checkpoint=True)
    assert numbers_of(before) + numbers_of(after) == Counter(dict.fromkeys(range(len(ROWS)), K))
    trained = {json.dumps(one.messages) for one in trajectories_of(after)}
    assert {json.dumps(row[4]["messages"]) for row in kept} <= trained


@pytest.mark.parametrize("now", [{"environment_factory": Room}, {"tools": []}])
def test_what_was_sampled_with_other_tools_is_sampled_again_after_a_resume(now, tmp_path):
    before = stopped(tmp_path)
    after = ahead(tmp_path, 2, **now)
    after.train(resume_from_checkpoint=True)
    assert numbers_of(before) + numbers_of(after) == Counter(dict.fromkeys(range(len(ROWS)), K))
    assert not any(scored.rewards.isnan().any() for scored in after.scored)


def test_an_environment_cannot_be_kept_so_that_its_trajectory_is_sampled_again(tmp_path):
    before = stopped(tmp_path, environment_factory=Room)
    assert not before.source.rounds._pending
    counts = ledger_counts(tmp_path)
    assert (counts["TRAINED"], counts.get("QUEUED", 0)) == (4, 0)
    assert counts["IN_FLIGHT"] > 0
    after = ahead(tmp_path, 2, environment_factory=Room)
    after.train(resume_from_checkpoint=True)
    assert numbers_of(before) + numbers_of(after) == Counter(dict.fromkeys(range(len(ROWS)), K))


def test_what_is_over_age_is_said_in_a_room_of_its_own_again(tmp_path, monkeypatch):
    trainer = ahead(tmp_path, 1, environment_factory=Room, max_steps=3)
    rounds = trainer.source.rounds
    over_age, asked = rounds._over_age, []

    def once(pending: Any, found: Any) -> Any:
        asked.append(0)
        return {(0, 1)} if len(asked) == 2 else over_age(pending, found)

    monkeypatch.setattr(rounds, "_over_age", once)
    trainer.train()
    assert sum(log.get("async/sampled_again", 0) for log in trainer.state.log_history) == 1
    assert len(asked) == 4
    rewards = torch.cat([scored.rewards for scored in trainer.scored])
    for scored in trainer.scored:
        for trajectory, given in zip(
            scored.rollout.trajectories, scored.rewards[:, 1].tolist(), strict=True
        ):
            said = [
                int(m["content"].split()[0]) for m in trajectory.messages if m["role"] == "tool"
            ]
            assert len(said) <= trajectory.num_calls
            assert sum(said) <= given
    assert not rewards.isnan().any()


def test_a_room_that_a_reward_still_looks_at_is_nobody_elses(tmp_path, monkeypatch):
    begun, undisturbed = list[int](), list[bool]()

    def looks(environments: list[Room], n: list[int], **_: Any) -> list[float]:
        heard = [room.heard for room in environments]
        begun.extend(n)
        time.sleep(0.3)
        undisturbed.append(all(a.heard is b for a, b in zip(environments, heard, strict=True)))
        return [float(len(words)) for words in heard]

    trainer = ahead(
        tmp_path, 1, looks, environment_factory=Room, max_steps=2, shuffle_dataset=False
    )
    rounds = trainer.source.rounds
    over_age, asked = rounds._over_age, []

    def once(pending: Any, found: Any) -> Any:
        asked.append(0)
        if len(asked) > 1:
            return over_age(pending, found)
        while 0 not in begun:
            time.sleep(0.01)
        return {(0, 0)}

    monkeypatch.setattr(rounds, "_over_age", once)
    trainer.train()
    assert len(undisturbed) > 2, "those of the first batch were asked for twice"
    assert all(undisturbed)


def test_an_environment_that_cannot_begin_ends_the_run_with_the_steps_before_it_saved(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(Room, "fails_at", 9)
    trainer = ahead(tmp_path, 2, environment_factory=Room, shuffle_dataset=False)
    with pytest.raises(EnvironmentFailed, match="the room is locked"):
        trainer.train()
    step = trainer.state.global_step
    assert 0 < step <= 4
    assert checkpoints(tmp_path)[-1].name == f"checkpoint-{step}"
    monkeypatch.setattr(Room, "fails_at", None)
    after = ahead(tmp_path, 2, environment_factory=Room, shuffle_dataset=False)
    after.train(resume_from_checkpoint=True)
    whole = numbers_of(after) + Counter({n: K for n in range(2 * step)})
    assert whole == Counter(dict.fromkeys(range(len(ROWS)), K))


def test_a_tool_that_hangs_as_a_run_ends_does_not_hold_it_up(tmp_path):
    hangs, at = threading.Event(), []

    def stuck(word: str) -> str:
        """
        Say how long a word is.

        Args:
            word: any
        """
        at.append(word)
        if len(at) > 30:
            hangs.wait(60)
        return f"{len(word)} of"

    stuck.__name__ = "echo"
    trainer = ahead(tmp_path, 3, tools=[stuck], tool_timeout_s=None, save_strategy="no")
    collect = trainer.source.next

    def terminated(*args: Any) -> Any:
        collected = collect(*args)
        trainer.termination.requested = True
        return collected

    trainer.source.next = terminated
    with pytest.raises(SystemExit):
        trainer.train()
    hangs.set()
    assert trainer.state.global_step == 1


def test_trajectories_go_through_what_is_asked_for_row_by_row():
    """rollout_of and sampled_of are each other's inverse."""
    trajectory = Trajectory([Strand([1, 2, 3, 4], [2, 3])], [])
    rollout = Rollout(
        [[3, 4]], ["stop"], [[-0.5, -0.25]], weights_version=3, token_versions=[[2, 3]],
        trajectories=[trajectory],
    )  # fmt: skip
    assert rollout_of(sampled_of(rollout), with_versions=True) == rollout
    plain = Rollout([[3, 4], []], ["stop", "length"], None, weights_version=3)
    assert [one.versions for one in sampled_of(plain)] == [[3, 3], []]
    assert rollout_of([]) == Rollout([], [], [])
