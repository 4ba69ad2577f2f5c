"""Rewards of finished groups, computed while others are being sampled; and the Collector's rows."""

import asyncio
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerState

import rloo_fast.step.collect
from rloo_fast.batching.budget import TokenBudget
from rloo_fast.batching.planner import Planner
from rloo_fast.config.rloo_config import RLOOConfig
from rloo_fast.data.seeds import step_seed
from rloo_fast.data.tokenize import RowTokenizer
from rloo_fast.records import Rollout
from rloo_fast.rewards import RewardError, RewardTimeout, load_reward_functions
from rloo_fast.rollout.cycle import RolloutCycle
from rloo_fast.rollout.engine import EngineError, RolloutEngine
from rloo_fast.rollout.settings import sampling_of
from rloo_fast.step.collect import Collector, PeerFailed, ScoreSettings
from tests.support.rewards import make_model as make_reward_model
from tests.support.rewards import make_tokenizer as make_reward_tokenizer
from tests.support.tiny import make_tokenizer

HIDDEN: list[float] = []  # seconds of rewards that the newest rollout hid
WAIT_S = 300  # longest that a test waits for what should happen at once
P, K = 3, 2
WHOLE = [range(P * K)]  # an engine's steps that finish all rows at once
IDS = [[6 + row, 1] for row in range(P * K)]  # "w0" .. "w5"


class Scripted(RolloutEngine):
    """Takes `steps` in turn: rows that finish, or functions to call; then returns all rows."""

    shares_weights = True

    def __init__(self, steps, **rollout):
        super().__init__()
        self.steps, self.reported, self.rollout = steps, [], rollout

    def _load(self, version, buckets):
        return

    def _generate(self, prompt_ids, sampling, seeds, on_finished):
        self.seeds = list(seeds)
        for step in self.steps:
            if callable(step):
                step()
                continue
            for row in step:
                on_finished(row, IDS[row])
                self.reported.append(row)
        size = len(prompt_ids)
        return Rollout(
            **{"completion_ids": IDS[:size], "finish_reasons": ["stop"] * size} | self.rollout
        )


def make_collector(engine, funcs, accelerator=None, rewards=None, **config):
    settings = {"overlap_rewards": True, **config}
    args = RLOOConfig("unused", use_cpu=True, bf16=False, num_generations=K, **settings)
    rewards = rewards or load_reward_functions(
        funcs,
        timeout_s=args.reward_timeout_s,
        processes=args.reward_processes,
        over_limit=args.reward_over_limit,
    )
    accelerator = accelerator or Accelerator(cpu=True)
    planner = Planner(TokenBudget(rows=8), device=torch.device("cpu"), pad_token_id=0)
    planner.layout_name = "padded"
    return Collector(
        RolloutCycle(engine, lambda: 0, lambda: []),
        RowTokenizer.from_config(make_tokenizer(), None, args),
        rewards,
        sampling_of(args, (1,)),
        planner,
        accelerator,
        scores=ScoreSettings(),
        mask_truncated=args.mask_truncated_completions,
        overlap_rewards=args.overlap_rewards,
        with_texts=args.log_completions,
        with_images=False,
        shows_images=False,
        tokens_per_pair=1.0,
        stage=lambda name: nullcontext(),
        hidden=HIDDEN.append,
        progress=lambda completions: nullcontext(lambda tokens: None),
    )


def collect(engine, funcs, seed=0, prompts=None, **options):
    """Collected; HIDDEN then holds the seconds of rewards that the rollout hid."""
    collector = make_collector(engine, funcs, **options)
    prompts = prompts or [{"prompt": f"w{i}", "number": i} for i in range(P)]
    HIDDEN.clear()
    try:
        return collector(prompts, K, seed, "eval", TrainerState())
    finally:
        collector.rewards.close()


def await_(event):
    assert event.wait(WAIT_S)


def wait_for(condition):
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def number_of(completion):
    return float(completion.removeprefix("w"))


def numbers(completions, **kwargs):
    return [number_of(c) for c in completions]


class Recorder:
    """A reward function that keeps which completions and threads it was called with."""

    __name__ = "recorder"

    def __init__(self):
        self.calls, self.threads = [], []
        self.started, self.may_return = threading.Event(), threading.Event()

    def __call__(self, completions, **kwargs):
        self.calls.append([int(number_of(c)) for c in completions])
        self.threads.append(threading.current_thread())
        self.started.set()
        await_(self.may_return)
        return numbers(completions)


# --- when functions are called


def test_finished_groups_are_scored_while_others_are_sampled():
    reward = Recorder()
    steps = [
        [1, 0],
        lambda: await_(reward.started),
        [4, 2, 5, 3],  # two groups gather while the first is scored
        reward.may_return.set,
        lambda: wait_for(lambda: len(reward.calls) == 2),
    ]
    collected = collect(Scripted(steps), reward)
    assert reward.calls == [[0, 1], [2, 3, 4, 5]]
    assert reward.threads[0] is reward.threads[1] is not threading.current_thread()
    assert collected.batch.rows.rewards[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert HIDDEN[0] > 0


def test_group_that_is_not_whole_waits():
    reward = Recorder()
    reward.may_return.set()
    steps = [[0, 2, 4], lambda: time.sleep(0.3), [1], lambda: await_(reward.started), [3, 5]]
    collect(Scripted(steps), reward)
    assert reward.calls == [[0, 1], [2, 3, 4, 5]]


@pytest.mark.parametrize("steps", [[[5, 3, 1, 0, 2, 4]], []], ids=["at-once", "never-reported"])
def test_engine_that_finishes_all_at_once_gives_one_call_in_its_thread(steps):
    reward = Recorder()
    reward.may_return.set()
    collect(Scripted(steps), reward)
    assert reward.calls == [[0, 1, 2, 3, 4, 5]]
    assert reward.threads == [threading.current_thread()]
    assert HIDDEN == [0]


def test_groups_reported_one_after_another_are_one_call(monkeypatch):
    monkeypatch.setattr("rloo_fast.rewards.overlap.GATHER_S", float(WAIT_S))
    reward = Recorder()
    reward.may_return.set()
    collect(Scripted([[0, 1], lambda: time.sleep(0.1), [2, 3, 4, 5]]), reward)
    assert reward.calls == [[0, 1, 2, 3, 4, 5]]


def test_without_overlap_there_is_one_call_after_generation():
    reward = Recorder()
    reward.may_return.set()
    steps = [[0, 1], lambda: time.sleep(0.3), [2, 3, 4, 5], lambda: time.sleep(0.3)]
    collect(Scripted(steps), reward, overlap_rewards=False)
    assert reward.calls == [[0, 1, 2, 3, 4, 5]]
    assert reward.threads == [threading.current_thread()]
    assert HIDDEN == [0]


def test_rewards_are_the_same_with_and_without_overlap():
    def by_column(completions, number, **kwargs):
        return [
            None if n == 1 else 10 * n + number_of(c)
            for c, n in zip(completions, number, strict=True)
        ]

    async def by_ids(completion_ids, prompts, **kwargs):
        await asyncio.sleep(0)
        return [ids[0] + number_of(p) for ids, p in zip(completion_ids, prompts, strict=True)]

    steps = [[4, 5], lambda: time.sleep(0.2), [1, 0], lambda: time.sleep(0.2), [2, 3]]
    found = []
    for overlap in (True, False):
        collected = collect(Scripted(steps), [by_column, by_ids], overlap_rewards=overlap)
        found.append(collected.batch.rows.rewards.T)
    torch.testing.assert_close(*found, equal_nan=True, rtol=0, atol=0)
    assert found[0][0].isnan().tolist() == [False, False, True, True, False, False]


def test_async_and_other_functions_of_a_batch_run_at_the_same_time():
    in_loop, here = threading.Event(), threading.Event()

    async def waits_for_the_other(completions, **kwargs):
        in_loop.set()
        async with asyncio.timeout(WAIT_S):
            while not here.is_set():
                await asyncio.sleep(0.01)
        return numbers(completions)

    def waits_for_the_async(completions, **kwargs):
        here.set()
        await_(in_loop)
        return numbers(completions)

    steps = [[0, 1], lambda: await_(in_loop), lambda: await_(here), [2, 3, 4, 5]]
    collected = collect(Scripted(steps), [waits_for_the_async, waits_for_the_other])
    assert collected.batch.rows.reward.tolist() == [0, 2, 4, 6, 8, 10]


def test_reward_model_runs_once_after_generation_while_functions_still_run():
    reward, model = Recorder(), make_reward_model()
    batches, forward = [], model.forward

    def spy(**inputs):
        assert len(reward.calls) == 1
        batches.append(len(inputs["input_ids"]))
        reward.may_return.set()
        return forward(**inputs)

    model.forward = spy
    tokenizer = make_reward_tokenizer(pad_token="<pad>")
    rewards = load_reward_functions([reward, model], [None, tokenizer])
    steps = [[0, 1], lambda: await_(reward.started), [2, 3, 4, 5]]
    collected = collect(Scripted(steps), None, rewards=rewards)
    assert batches == [P * K]
    assert reward.calls == [[0, 1], [2, 3, 4, 5]]
    assert not collected.batch.rows.rewards[:, 1].isnan().any()


# --- what functions log


def test_extras_come_in_row_order_and_metrics_over_all_calls():
    seen = threading.Semaphore(0)

    def reward(completions, log_extra, log_metric, **kwargs):
        log_extra("text", completions)
        log_extra("first", completions[:1])
        for completion in completions:
            log_metric("number", number_of(completion))
        seen.release()
        return numbers(completions)

    wait = lambda: seen.acquire(timeout=WAIT_S)  # noqa: E731
    steps = [[4, 5], wait, [2, 3], wait, [0, 1]]
    collected = collect(Scripted(steps), reward, log_completions=True)
    assert collected.texts.extra == {"text": [f"w{i}" for i in range(6)]}  # "first" is too short
    assert collected.logged["number"] == 2.5


def test_a_share_of_each_call_becomes_the_share_of_all_rows():
    seen = threading.Semaphore(0)

    def reward(completions, log_metric, **kwargs):
        values = numbers(completions)
        log_metric("mean", sum(values) / len(values))
        seen.release()
        return values

    wait = lambda: seen.acquire(timeout=WAIT_S)  # noqa: E731
    collected = collect(Scripted([[4, 5], wait, [0, 1, 2, 3]]), reward)
    assert collected.logged["mean"] == 2.5  # not that of 4.5 and 1.5


def test_a_failure_on_another_process_ends_this_one_too(monkeypatch):
    def reward(completions, **kwargs):
        return numbers(completions)

    monkeypatch.setattr(
        rloo_fast.step.collect, "gather_objects", lambda _, mine: [mine, "Error: x"]
    )
    with pytest.raises(PeerFailed, match="process 1 failed: Error: x"):
        collect(Scripted(WHOLE), reward)


def test_value_that_cannot_be_logged_names_its_function():
    def reward(completions, log_metric, **kwargs):
        log_metric("x", "many")

    with pytest.raises(RewardError, match="'reward' raised ValueError"):
        collect(Scripted(WHOLE), reward)


# --- errors


def test_failing_function_ends_generation_at_the_next_finished_row():
    calls, failed = [], threading.Event()

    def broken(completions, **kwargs):
        calls.append(len(completions))
        failed.set()
        raise KeyError("gold")

    def fail_soon():
        await_(failed)
        for row in (2, 3, 4, 5):
            time.sleep(0.2)  # as long as the error may take from there to the collector
            yield row

    engine = Scripted([[0, 1], fail_soon()])
    with pytest.raises(RewardError, match=r"Reward function 'broken' raised KeyError: 'gold'"):
        collect(engine, [broken])
    assert engine.reported[:2] == [0, 1]
    assert len(engine.reported) < 6
    assert calls == [2]


def test_failure_is_raised_at_the_latest_when_generation_ends():
    failed = threading.Event()

    def broken(completions, **kwargs):
        failed.set()
        raise KeyError("gold")

    steps = [[0, 1], lambda: await_(failed), lambda: time.sleep(0.1)]
    with pytest.raises(RewardError, match="'broken' raised KeyError"):
        collect(Scripted(steps), broken)


def test_wrong_value_names_its_row_in_the_batch():
    def reward(completions, **kwargs):
        return [float("nan") if c == "w5" else 0.0 for c in completions]

    steps = [[4, 5], lambda: time.sleep(0.3)]
    with pytest.raises(ValueError, match=r"returned nan for sample 5 \(prompt 'w2'.*'w5'"):
        collect(Scripted(steps), reward)


def test_nothing_more_is_called_after_an_engine_failed():
    reward, cancelled = Recorder(), threading.Event()
    later = []

    async def judge(**kwargs):
        try:
            await asyncio.sleep(WAIT_S)
        finally:
            cancelled.set()

    def after(completions, **kwargs):
        later.append(completions)

    def die():
        raise EngineError("out of memory")

    rewards = load_reward_functions([reward, judge, after])
    steps = [[0, 1], lambda: await_(reward.started), [2, 3], die]
    with pytest.raises(EngineError, match="out of memory"):
        collect(Scripted(steps), None, rewards=rewards)
    await_(cancelled)
    reward.may_return.set()
    reward.threads[0].join(WAIT_S)
    assert not reward.threads[0].is_alive()
    assert (reward.calls, later) == ([[0, 1]], [])


def test_async_function_is_cancelled_when_an_engine_failed():
    started, cancelled = threading.Event(), threading.Event()

    async def judge(**kwargs):
        started.set()
        try:
            await asyncio.sleep(2 * WAIT_S)
        finally:
            cancelled.set()

    def die():
        raise EngineError("out of memory")

    collector = make_collector(Scripted([[0, 1], lambda: await_(started), die]), judge)
    prompts = [{"prompt": f"w{i}"} for i in range(P)]
    with pytest.raises(EngineError):
        collector(prompts, K, 0, "eval", TrainerState())
    await_(cancelled)  # not by close
    collector.rewards.close()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_hung_function_times_out_during_generation(kind):
    release = threading.Event()

    def hung(**kwargs):
        release.wait(WAIT_S)

    async def hung_async(**kwargs):
        await asyncio.sleep(WAIT_S)

    start = time.monotonic()
    steps = [[0, 1], lambda: time.sleep(0.5), [2, 3]]
    with pytest.raises(RewardTimeout, match=r"still ran after 0\.2 s"):
        collect(Scripted(steps), hung if kind == "sync" else hung_async, reward_timeout_s=0.2)
    assert time.monotonic() - start < WAIT_S / 2
    release.set()


def test_completion_other_than_the_one_scored_is_not_returned():
    with pytest.raises(AssertionError):
        collect(Scripted(WHOLE, completion_ids=[[7, 1]] * 6), numbers)


# --- the Collector's rows


def test_seeds_follow_prompt_and_sample_whatever_the_number_of_processes():
    def seeds(world, rank):
        accelerator = SimpleNamespace(
            num_processes=world,
            process_index=rank,
            device=torch.device("cpu"),
            gather=lambda rows: rows.repeat(world, 1),
        )
        engine = Scripted([])
        collect(engine, numbers, seed=7, accelerator=accelerator)
        return engine.seeds

    expected = [step_seed(7, prompt, sample) for prompt in range(P) for sample in range(K)]
    assert seeds(1, 0) == seeds(2, 0) + seeds(2, 1) == expected


def test_group_split_over_processes_is_scored_in_its_parts():
    accelerator = SimpleNamespace(
        num_processes=2,
        process_index=1,
        device=torch.device("cpu"),
        gather=lambda rows: rows.repeat(2, 1),
    )
    reward = Recorder()
    reward.may_return.set()
    # rows 3, 4, 5 of all: the second sample of prompt 1, both of prompt 2
    steps = [[0], lambda: await_(reward.started), [1, 2]]
    collect(Scripted(steps), reward, accelerator=accelerator)
    assert reward.calls == [[0], [1, 2]]


def test_sampler_logps_are_packed_without_masked_rows():
    logps = [[-0.5, -1.0 - row] for row in range(6)]
    reasons = ["stop", "length", "stop", "stop", "length", "stop"]
    ids = [[6 + row, 1 if reason == "stop" else 0] for row, reason in enumerate(reasons)]
    engine = Scripted([], completion_ids=ids, logps=logps, finish_reasons=reasons)
    collected = collect(engine, numbers, mask_truncated_completions=True)
    assert collected.batch.sampler_logps.tolist() == [x for row in (0, 2, 3, 5) for x in logps[row]]
    assert collected.batch.sampler_logps.dtype == torch.float32
    assert len(collected.batch.sampler_logps) == sum(collected.batch.num_tokens)


def test_engine_without_logps_gives_none():
    collected = collect(Scripted(WHOLE), numbers)
    assert collected.batch.sampler_logps is None


def test_missing_logps_are_refused():
    with pytest.raises(EngineError, match="1 log-probs for a completion of 2 tokens"):
        collect(Scripted(WHOLE, logps=[[-0.5]] * 6), numbers)
