"""Calls that are ended: the error names the sample, or it is scored and counted, others as ever.

The functions are at the top level, where worker processes find them.
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rloo_fast.rewards import RewardError, RewardTimeout, load_reward_functions
from tests.rewards.test_overlap import Scripted, collect, numbers
from tests.support.paths import python_path
from tests.support.rewards import NAN, assert_same

GROUPS = [[0, 1], [2, 3], [4, 5]]
COMPLETIONS = ["w1", "w2", "w3", "w4"]
LIMIT_S = 1.5


def holds_the_gil_on_w2(completions, log_extra, log_metric, trainer_state, **kwargs):
    if "w2" in completions:
        9**9**9
    log_extra("seen", [f"{c} of {len(completions)}" for c in completions])
    log_metric("calls", 1.0)
    return numbers(completions)


def dies_of_w2(completions, **kwargs):
    if "w2" in completions:
        os.kill(os.getpid(), signal.SIGSEGV)
    return numbers(completions)


def share_of_group(completions, **kwargs):
    """Of several completions only: alone, it raises."""
    if "w2" in completions:
        time.sleep(100)
    if len(completions) == 1:
        raise ZeroDivisionError
    return [n / (len(completions) - 1) for n in numbers(completions)]


def too_slow_together(completions, **kwargs):
    time.sleep(0.5 * len(completions))
    return numbers(completions)


def killed_once(completions, folder, **kwargs):
    mark = Path(folder[0], "killed")
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return numbers(completions)


async def waits_on_w2(completions, log_extra, **kwargs):
    await asyncio.sleep(100 if "w2" in completions else 0)
    log_extra("asked", completions)
    return numbers(completions)


async def blocks_on_w2(completions, **kwargs):
    time.sleep(3 if "w2" in completions else 0)
    return numbers(completions)


def score(function, over_limit="error", columns=None, processes=1, limit_s=LIMIT_S):
    rewards = load_reward_functions(
        function, timeout_s=limit_s, processes=processes, over_limit=over_limit
    )
    logged, extra = {}, {}
    columns = columns or {"id": ["a", "b", "c", "d"]}
    prompts = [[{"role": "user", "content": f"p{i}"}] for i in range(4)]
    try:
        found = rewards(
            prompts,
            COMPLETIONS,
            [[7]] * 4,
            columns,
            trainer_state="state",
            log_extra=extra.__setitem__,
            log_metric=logged.__setitem__,
        )
    finally:
        rewards.close()
    return found[:, 0], logged, extra


@pytest.mark.parametrize(("over_limit", "value"), [(-1, -1.0), ("none", NAN)])
def test_a_completion_over_the_limit_is_scored_by_choice_and_the_others_as_without_it(
    over_limit, value
):
    rewards, logged, extra = score(holds_the_gil_on_w2, over_limit)
    assert_same(rewards, [1.0, value, 3.0, 4.0])
    assert logged == {"calls": 1.0, "over_limit": 1}
    assert extra == {"seen": ["w1 of 3", None, "w3 of 3", "w4 of 3"]}


def test_the_error_names_the_function_and_the_sample():
    with pytest.raises(RewardTimeout) as e:
        score(holds_the_gil_on_w2)
    assert str(e.value) == (
        "Reward function 'holds_the_gil_on_w2' still ran after 1.5 s on sample 1 (id 'b', prompt "
        "'p1', completion 'w2')."
    )


def test_a_process_that_a_completion_kills_is_the_same():
    rewards, logged, _ = score(dies_of_w2, 0.0)
    assert_same(rewards, [1.0, 0.0, 3.0, 4.0])
    assert logged == {"over_limit": 1}
    with pytest.raises(RewardError, match=r"'dies_of_w2' died \(exit code -11\) on sample 1 \(id"):
        score(dies_of_w2)


def test_a_process_that_someone_else_kills_costs_nothing(tmp_path):
    rewards, _, _ = score(killed_once, columns={"folder": [str(tmp_path)] * 4})
    assert_same(rewards, [1.0, 2.0, 3.0, 4.0])


def test_a_function_of_whole_groups_gets_the_others_together():
    rewards, logged, _ = score(share_of_group, 0.0)
    assert_same(rewards, [0.5, 0.0, 1.5, 2.0])
    assert logged == {"over_limit": 1}


def test_where_none_is_over_the_limit_alone_all_are():
    rewards, logged, _ = score(too_slow_together, "none", limit_s=1.0)
    assert_same(rewards, [NAN] * 4)
    assert logged == {"over_limit": 4}
    with pytest.raises(
        RewardTimeout, match=r"on 4 samples: sample 0 \(.*sample 2 \(.*; and 1 more"
    ):
        score(too_slow_together, limit_s=1.0)


def test_async_functions_are_cancelled_and_scored_without_processes():
    rewards, logged, extra = score(waits_on_w2, 0.0, processes=0, limit_s=0.5)
    assert_same(rewards, [1.0, 0.0, 3.0, 4.0])
    assert logged == {"over_limit": 1}
    assert extra == {"asked": ["w1", None, "w3", "w4"]}
    with pytest.raises(RewardTimeout, match=r"on sample 1 \(id 'b'"):
        score(waits_on_w2, processes=0, limit_s=0.5)


def test_an_async_function_that_blocks_ends_the_run_whatever_was_chosen():
    with pytest.raises(RewardTimeout, match=r"on 4 samples: .*did not stop when cancelled"):
        score(blocks_on_w2, 0.0, processes=0, limit_s=0.2)


def test_a_function_of_this_process_cannot_be_scored_and_builtins_can():
    with pytest.raises(ValueError, match=r"needs reward_processes >= 1: .*`numbers`"):
        load_reward_functions([numbers, "accuracy"], timeout_s=1, over_limit=0.0)
    load_reward_functions(["accuracy", "reasoning_gym", waits_on_w2], timeout_s=1, over_limit=0.0)


def test_a_run_goes_on_and_counts_what_was_over_the_limit():
    """As with vLLM: groups are scored while others are sampled, some in other threads."""
    collected = collect(
        Scripted(GROUPS),
        [holds_the_gil_on_w2, waits_on_w2],
        reward_processes=2,
        reward_timeout_s=LIMIT_S,
        reward_over_limit=0.0,
        log_completions=True,
    )
    assert collected.batch.rows.rewards.tolist() == [[n, n] for n in (0, 1, 0, 3, 4, 5)]
    assert collected.logged["over_limit"] == 2
    assert collected.logged["calls"] == 1
    assert collected.texts.extra["asked"] == ["w0", "w1", None, "w3", "w4", "w5"]


# --- in the trainer's process, where nothing can be ended


def test_the_error_says_where_a_function_of_this_process_is():
    def slow(completions, **kwargs):
        time.sleep(2)

    with pytest.raises(RewardTimeout, match=r"on 4 samples: sample 0.*reward_processes=1") as e:
        score(slow, processes=0, limit_s=0.2)
    assert "time.sleep(2)" in e.value.__notes__[0]


SCRIPT = """
import os, threading
from rloo_fast.rewards import load_reward_functions

def holds_the_gil(completions, **kwargs):
    return [float(len(str(9**9**9))) for c in completions]

rewards = load_reward_functions(holds_the_gil, timeout_s=0.5)
rewards(["a prompt"], ["a completion"], [[7]], {})
"""


@pytest.mark.slow
def test_a_function_that_holds_the_gil_is_told_from_outside_python():
    run = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": python_path()},
    )
    assert run.stderr is not None
    seen = b""
    while b"in holds_the_gil" not in seen or b"a completion" not in seen:
        line = run.stderr.readline()
        assert line, seen
        seen += line
    run.kill()
    run.communicate()
    assert re.search(rb"in reward function 'holds_the_gil'.*'a completion' to 'a prompt'", seen)
