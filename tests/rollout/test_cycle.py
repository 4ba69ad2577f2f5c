"""Rollouts and updates take turns: what is asked of engine and trainer, in order, and what is
refused when the order is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rloo_fast.records import Sampling
from rloo_fast.rollout.cycle import RolloutCycle
from rloo_fast.rollout.engine import EngineError, EngineState, StaleWeights
from tests.support.fake_engine import FakeEngine

SAMPLING = Sampling(
    temperature=1.0, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0, max_new_tokens=6,
    stop_token_ids=(1,),
)  # fmt: skip
PROMPTS = [[9, 10], [11], [9, 10], [12, 13, 14]]
SEEDS = [0, 1, 2, 3]
WEIGHTS = [[("a", torch.ones(256)), ("b", torch.zeros(256))], [("c", torch.ones(512))]]

MAKE, GIVE_BACK = ("room.make",), ("room.give_back",)
WAKE_WEIGHTS, WAKE_CACHE = ("wake", ("weights",)), ("wake", ("kv_cache",))


class RecordingRoom:
    def __init__(self, calls):
        self.calls, self.is_made = calls, False

    def make(self):
        self.calls.append(MAKE)
        self.is_made = True

    def give_back(self):
        self.calls.append(GIVE_BACK)
        self.is_made = False


class Run:
    """A cycle on the fake engine, the calls it makes, and the policy's version to be set."""

    def __init__(self, sleep_level=2):
        self.calls, self.version = [], 0
        self.syncs = []
        self.engine = FakeEngine(self.calls)
        self.cycle = RolloutCycle(
            self.engine, lambda: self.version, lambda: iter(WEIGHTS), sleep_level=sleep_level,
            room=RecordingRoom(self.calls), on_sync=lambda *sync: self.syncs.append(sync),
        )  # fmt: skip

    def roll_out(self):
        return self.cycle.generate(PROMPTS, SAMPLING, SEEDS)

    def new_calls(self):
        calls = list(self.calls)
        self.calls.clear()
        return calls


def test_a_rollout_and_the_sleep_after_it():
    run = Run()
    run.version = 7
    rollout = run.roll_out()
    run.cycle.sleep()
    assert run.calls == [
        MAKE,
        WAKE_WEIGHTS,
        ("load_weights", 7),
        WAKE_CACHE,
        ("generate", 7),
        ("sleep", 2),
        GIVE_BACK,
    ]
    assert rollout.weights_version == 7


def test_every_update_is_followed_by_the_same_calls():
    run = Run()
    rounds = []
    for version in range(3):
        run.version = version
        run.roll_out()
        run.cycle.sleep()
        rounds.append([(c[0], c[1] - version) if c[0] in ("load_weights", "generate") else c
                       for c in run.new_calls()])  # fmt: skip
    assert rounds[1] == rounds[0]
    assert rounds[2] == rounds[0]


def test_a_second_rollout_of_the_same_weights_finds_the_engine_awake():
    run = Run()
    run.roll_out()
    run.new_calls()
    run.roll_out()
    assert run.calls == [("generate", 0)]


def test_new_weights_reach_an_engine_that_was_not_put_to_sleep():
    run = Run()
    run.roll_out()
    run.new_calls()
    run.version = 1
    run.roll_out()
    assert run.calls == [
        ("sleep", 2), GIVE_BACK, MAKE, WAKE_WEIGHTS, ("load_weights", 1), WAKE_CACHE,
        ("generate", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("level", [0, 1])
def test_weights_kept_in_sleep_are_loaded_again_only_when_they_are_old(level):
    run = Run(sleep_level=level)
    run.roll_out()
    run.cycle.sleep()
    run.new_calls()
    run.roll_out()
    assert run.new_calls() == [MAKE, WAKE_WEIGHTS, WAKE_CACHE, ("generate", 0)]
    run.cycle.sleep()
    run.version = 1
    run.roll_out()
    assert run.calls == [
        ("sleep", level), GIVE_BACK, MAKE, WAKE_WEIGHTS, ("load_weights", 1), WAKE_CACHE,
        ("generate", 1),
    ]  # fmt: skip


def test_an_engine_that_sleeps_is_not_sent_to_sleep_again():
    run = Run()
    run.cycle.sleep()
    run.roll_out()
    run.cycle.sleep()
    run.cycle.sleep()
    assert [call for call in run.calls if call[0] == "sleep"] == [("sleep", 2)]


def test_a_closed_cycle_has_given_everything_back():
    run = Run()
    run.roll_out()
    run.new_calls()
    run.cycle.close()
    assert run.calls == [("close",), GIVE_BACK]
    with pytest.raises(EngineError, match="'closed'"):
        run.roll_out()


def test_what_was_sent_is_counted_and_arrives():
    run = Run()
    run.roll_out()
    [(mode, seconds, num_bytes)] = run.syncs
    assert (mode, num_bytes) == ("train", 4096)
    assert seconds >= 0
    run.cycle.generate(PROMPTS, SAMPLING, SEEDS, mode="eval")  # the same weights: nothing is sent
    assert len(run.syncs) == 1
    assert run.engine.weights.keys() == {"a", "b", "c"}


def test_the_rollout_reaches_the_caller_row_by_row():
    run, finished = Run(), {}
    rollout = run.cycle.generate(PROMPTS, SAMPLING, SEEDS, finished.__setitem__)
    assert finished == dict(enumerate(rollout.completion_ids))


# A load that fails


def test_after_half_a_load_nothing_is_generated_until_all_weights_came():
    run = Run()
    run.roll_out()
    run.cycle.sleep()
    run.version, run.engine.fails_after = 1, 1
    with pytest.raises(RuntimeError, match="middle of a load"):
        run.roll_out()
    assert run.engine.state is EngineState.WEIGHTS_AWAKE
    assert run.engine.version is None
    with pytest.raises(EngineError, match="must be 'ready'"):
        run.engine.generate(PROMPTS, SAMPLING, SEEDS, version=1)
    with pytest.raises(EngineError, match="must be 'synced"):
        run.engine.wake(("kv_cache",))
    run.new_calls()
    run.roll_out()
    assert run.calls == [("load_weights", 1), WAKE_CACHE, ("generate", 1)]


def test_half_a_load_does_not_leave_the_version_before_it():
    engine = synced(FakeEngine(), version=4)
    engine.fails_after = 1
    with pytest.raises(RuntimeError, match="middle of a load"):
        engine.load_weights(5, WEIGHTS)
    assert engine.version is None
    with pytest.raises(EngineError, match="weights not loaded"):
        engine.wake(("kv_cache",))


# Orders that are refused


def synced(engine, version=0):
    engine.wake(("weights",))
    engine.load_weights(version, WEIGHTS)
    return engine


def ready(engine, version=0):
    synced(engine, version).wake(("kv_cache",))
    return engine


def generate(engine, version=0):
    return engine.generate(PROMPTS, SAMPLING, SEEDS, version=version)


@pytest.mark.parametrize("version", [2, 4])
def test_completions_of_other_weights_are_refused(version):
    with pytest.raises(StaleWeights, match=f"holds weights 3, the policy is at {version}"):
        generate(ready(FakeEngine(), version=3), version)


def test_the_weights_that_sleep_dropped_are_not_taken_for_loaded():
    engine = ready(FakeEngine())
    engine.sleep(2)
    engine.wake(("weights",))
    with pytest.raises(EngineError, match=r'wake\("kv_cache"\).*weights not loaded'):
        engine.wake(("kv_cache",))


@pytest.mark.parametrize("state", ["asleep", "weights awake", "synced"])
def test_generate_needs_an_engine_that_is_ready(state):
    engine = FakeEngine()
    if state == "weights awake":
        engine.wake(("weights",))
    elif state == "synced":
        synced(engine)
    with pytest.raises(EngineError, match="must be 'ready'"):
        generate(engine)


def test_weights_are_not_loaded_into_an_engine_that_sleeps():
    with pytest.raises(EngineError, match=r"load_weights: .* it is 'asleep'"):
        FakeEngine().load_weights(0, WEIGHTS)


def test_weights_are_not_changed_under_a_filled_cache():
    with pytest.raises(EngineError, match=r"load_weights: .* it is 'ready'"):
        ready(FakeEngine()).load_weights(1, WEIGHTS)


def test_the_cache_does_not_wake_before_the_weights():
    with pytest.raises(EngineError, match="it is 'asleep'"):
        FakeEngine().wake(("kv_cache",))
    with pytest.raises(EngineError, match="weights not loaded"):
        FakeEngine().wake(("weights", "kv_cache"))


def test_an_engine_does_not_wake_or_sleep_twice():
    engine = ready(FakeEngine())
    with pytest.raises(EngineError, match=r'wake\("weights"\)'):
        engine.wake(("weights",))
    engine.sleep(2)
    with pytest.raises(EngineError, match=r"sleep: .* it is 'asleep'"):
        engine.sleep(2)


@pytest.mark.parametrize("level", [-1, 3])
def test_there_are_three_levels_of_sleep(level):
    engine = ready(FakeEngine())
    with pytest.raises(ValueError, match=f"0, 1 and 2, got {level}"):
        engine.sleep(level)
    assert engine.state is EngineState.READY


def test_a_tag_that_means_nothing_is_named():
    with pytest.raises(ValueError, match="got 'cache'"):
        FakeEngine().wake(("cache",))


def test_every_prompt_needs_a_seed():
    with pytest.raises(ValueError, match="4 prompts need as many seeds, got 3"):
        ready(FakeEngine()).generate(PROMPTS, SAMPLING, SEEDS[:3], version=0)


def test_a_closed_engine_can_do_nothing_but_be_closed():
    engine = ready(FakeEngine())
    engine.close()
    engine.close()
    for ask in (
        lambda: engine.wake(("weights",)),
        lambda: engine.load_weights(0, WEIGHTS),
        lambda: generate(engine),
        lambda: engine.sleep(2),
    ):
        with pytest.raises(EngineError, match="'closed'"):
            ask()


# The fake itself: what others build on


def test_a_fake_completion_follows_from_its_prompt_and_seed():
    engine = ready(FakeEngine())
    together = generate(engine)
    for i in range(len(PROMPTS)):
        alone = engine.generate([PROMPTS[i]], SAMPLING, [SEEDS[i]], version=0)
        assert alone.completion_ids == [together.completion_ids[i]]
        assert together.logps is not None
        assert alone.logps == [together.logps[i]]
    assert together.completion_ids[0] != together.completion_ids[2]  # one prompt, two seeds


def test_fake_completions_end_as_real_ones_do():
    engine = ready(FakeEngine(logps=False))
    rollout = engine.generate(PROMPTS * 20, SAMPLING, range(80), version=0)
    for ids, reason in zip(rollout.completion_ids, rollout.finish_reasons, strict=True):
        assert [token == 1 for token in ids] == [False] * (len(ids) - 1) + [reason == "stop"]
        assert reason == "stop" or len(ids) == 6
    assert {"stop", "length"} == set(rollout.finish_reasons)
    assert rollout.logps is None
    endless = engine.generate(PROMPTS, replace(SAMPLING, stop_token_ids=()), SEEDS, version=0)
    assert endless.finish_reasons == ["length"] * 4
