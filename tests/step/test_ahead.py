"""Batches sampled ahead of their step: the same run at bound 0, a bound that holds, prompts that
are trained once whatever ends the run."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset

from rloo_fast.checkpoint.files import checkpoints
from rloo_fast.data.row_errors import UnusableRow
from rloo_fast.rollout.engine import EngineError
from rloo_fast.step import build, loaders
from rloo_fast.step.source import LoaderSource
from tests.support.interrupted import assert_same_but_for_the_queue
from tests.support.kill_ahead import ENGINE, PROMPTS, K, ledger_counts, slow_reward
from tests.support.kill_resume import make_trainer

ROWS = Dataset.from_list([{"prompt": prompt, "n": n} for n, prompt in enumerate(PROMPTS[:16])])
STEPS = 8  # an epoch: two prompts each


def ahead(output_dir: Path, max_staleness: int, reward: Any = slow_reward, **settings: Any) -> Any:
    """A trainer with an engine that samples in threads, and `trained`: what each step took."""
    given = {
        "rollout_engine": ENGINE,
        "max_staleness": max_staleness,
        "max_steps": STEPS,
        "save_strategy": "no",
        "learning_rate": 1e-4,
        "beta": 0.0,
        "model": None,
        "train_dataset": ROWS,
        **settings,
    }
    trainer: Any = make_trainer(output_dir, reward, **given)
    collect, trainer.trained = trainer.source.next, []

    def noted(*args: Any) -> Any:
        collected = collect(*args)
        trainer.trained.append(collected.batch)
        return collected

    trainer.source.next = noted
    return trainer


def prompts_of(trainer: Any) -> list[tuple[int, ...]]:
    return [tuple(ids) for batch in trainer.trained for ids in batch.prompt_ids]


# Bound 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_iterations": 2, "overlap_rewards": True},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "eval_steps": 2},
    ],
    ids=["one batch a step", "two passes, rewards overlapped", "half a batch a step, evaluation"],
)
def test_with_bound_0_weights_and_metrics_are_those_of_the_synchronous_run(
    settings, tmp_path, monkeypatch
):
    settings = {"save_strategy": "no", **settings}
    if "eval_steps" in settings:
        settings["eval_strategy"] = "steps"
    synchronous = make_trainer(tmp_path / "synchronous", **settings)
    synchronous.train()
    for module in (build, loaders):
        monkeypatch.setattr(module, "samples_ahead", lambda args: True)
    queued = make_trainer(tmp_path / "queued", **settings)
    assert type(queued.source) is not type(synchronous.source) is LoaderSource
    queued.train()
    assert_same_but_for_the_queue(synchronous, queued)


# The bound


@pytest.mark.parametrize(
    ("bound", "settings"),
    [
        (1, {}),
        (3, {}),
        (2, {"weight_sync_steps": 3}),
        (3, {"queue_maxsize": 4}),
        (2, {"rollout_engine": ENGINE.replace("SlowCopiedEngine", "CopiedCalls")}),
        (2, {"eval_strategy": "steps", "eval_steps": 3}),
    ],
    ids=["1", "3", "weights every third step", "short queue", "whole calls", "evaluation"],
)
def test_no_token_is_older_than_the_bound_and_prompts_keep_their_order(bound, settings, tmp_path):
    trainer = ahead(tmp_path, bound, **settings)
    trainer.train()
    lags = torch.cat([batch.staleness for batch in trainer.trained])
    assert lags.min() == 0
    assert 0 < lags.max() <= bound
    synchronous: Any = make_trainer(tmp_path / "order", train_dataset=ROWS, model=None)
    order = [row["prompt"] for rows in synchronous.get_train_dataloader() for row in rows]
    expected = [tuple(synchronous.processing_class(text).input_ids) for text in order]
    assert prompts_of(trainer) == [ids for ids in expected for _ in range(K)]


def test_weights_are_loaded_while_completions_are_under_way(tmp_path):
    trainer = ahead(tmp_path, 2)
    trainer.train()
    engine = trainer.rollouts.engine
    assert engine.loads == list(range(1, STEPS + 1))
    assert max(engine.open_at_loads) > 0
    mixed = [len(v.unique()) for b in trainer.trained for v in b.token_versions.split(b.num_tokens)]
    assert max(mixed) > 1, "a completion goes on with new weights"
    assert max(row.get("sampling/logp_diff_max", 0) for row in trainer.state.log_history) < 1e-4


def test_completions_that_are_over_age_after_a_resume_are_sampled_again(tmp_path):
    before = ahead(tmp_path, 3, save_strategy="steps", save_steps=1, max_steps=5)
    before.train()
    checkpoint = tmp_path / "checkpoint-3"
    state = torch.load(checkpoint / "rloo_state_0.pt", weights_only=True)["source"]
    old = [
        row
        for batch in state["batches"]
        for rows in batch["found"] or []
        for row in rows
        if row is not None and row[3][0] < state["version"] - 1
    ]
    assert old, "nothing in the checkpoint is older than the new bound"
    after = ahead(tmp_path / "after", 1)
    after.train(resume_from_checkpoint=str(checkpoint))
    assert max(batch.staleness.max() for batch in after.trained) <= 1
    assert sum(r.get("async/sampled_again", 0) for r in after.state.log_history) > 0


# Ends


def test_a_reward_that_fails_ends_the_run_at_its_own_step(tmp_path):
    def fails_late(completions: list[str], prompts: list[str], **_: Any) -> list[float]:
        if PROMPTS[15] in prompts:
            raise ZeroDivisionError
        return [0.0] * len(completions)

    trainer = ahead(tmp_path, 3, fails_late, shuffle_dataset=False)
    with pytest.raises(Exception, match="ZeroDivisionError"):
        trainer.train()
    assert trainer.state.global_step == STEPS - 1
    assert checkpoints(tmp_path)[-1].name == f"checkpoint-{STEPS - 1}"


def test_a_prompt_that_cannot_be_used_ends_the_run_at_its_own_step(tmp_path):
    trainer = ahead(tmp_path, 3, shuffle_dataset=False)
    tokenize = trainer.collector.tokenize

    def refuses(rows: list[dict[str, Any]]) -> Any:
        if any(row["n"] == 10 for row in rows):
            raise UnusableRow("a prompt is empty")
        return tokenize(rows)

    trainer.collector.tokenize = refuses
    with pytest.raises(ValueError, match="a prompt is empty"):
        trainer.train()
    assert trainer.state.global_step == 5


@pytest.mark.parametrize("breaks_at", [11, 12], ids=["within a batch", "before its last prompt"])
def test_a_stream_that_breaks_is_read_on_after_a_resume(breaks_at, tmp_path):
    def rows(breaks: bool) -> Any:
        for number, row in enumerate(ROWS):
            if breaks and number == breaks_at - 1:
                raise OSError("the network is gone")
            yield row

    def run(breaks: bool) -> Any:
        data = IterableDataset.from_generator(rows, gen_kwargs={"breaks": breaks})
        return ahead(tmp_path, 3, shuffle_dataset=False, train_dataset=data)

    broken = run(True)
    with pytest.raises(ValueError, match="OSError: the network is gone"):
        broken.train()
    step = broken.state.global_step
    assert step == 5
    resumed = run(False)
    resumed.train(resume_from_checkpoint=True)
    trained = Counter(prompts_of(broken) + prompts_of(resumed))
    assert set(trained.values()) == {K}
    assert len(trained) == len(ROWS)


def test_an_engine_that_dies_saves_the_steps_done_and_the_rest_is_trained_once(tmp_path):
    trainer = ahead(tmp_path, 2)
    complete, count = trainer.rollouts.engine.complete, []

    def dies(*args: Any) -> Any:
        count.append(0)
        if len(count) > 18:
            raise EngineError("the last of the rollout servers is gone")
        return complete(*args)

    trainer.rollouts.engine.complete = dies
    with pytest.raises(EngineError, match="the last of") as raised:
        trainer.train()
    step = trainer.state.global_step
    assert step > 0
    assert f"checkpoint-{step} holds the {step} steps done" in raised.value.__notes__[0]
    counts = ledger_counts(tmp_path)
    assert counts["TRAINED"] == 2 * step
    assert counts["IN_FLIGHT"] > 0
    resumed = ahead(tmp_path, 2)
    resumed.train(resume_from_checkpoint=True)
    trained = Counter(prompts_of(trainer)[: 2 * K * step] + prompts_of(resumed))
    assert set(trained.values()) == {K}
    assert len(trained) == len(ROWS)


def test_sigterm_with_requests_in_flight_saves_and_exits_after_the_step(tmp_path):
    trainer = ahead(tmp_path, 3)
    collect = trainer.source.next

    def terminated(*args: Any) -> Any:
        collected = collect(*args)
        trainer.termination.requested = len(trainer.trained) == 3
        trainer.rollouts.engine.stall_s = 60.0  # of what is asked for from now on
        return collected

    trainer.source.next, begin = terminated, time.monotonic()
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 0
    assert time.monotonic() - begin < 30, "it waited for what it will not train"
    assert trainer.state.global_step == 3
    assert ledger_counts(tmp_path)["IN_FLIGHT"] > 0
    resumed = ahead(tmp_path, 3)
    resumed.train(resume_from_checkpoint=True)
    trained = Counter(prompts_of(trainer) + prompts_of(resumed))
    assert set(trained.values()) == {K}
    assert len(trained) == len(ROWS)


def test_a_run_ahead_is_not_resumed_as_another_kind(tmp_path):
    ahead(tmp_path, 1, save_strategy="steps", save_steps=2, max_steps=2).train()
    with pytest.raises(ValueError, match="max_staleness"):
        make_trainer(tmp_path, train_dataset=ROWS, max_steps=4).train(resume_from_checkpoint=True)
