"""Async reward functions and time limits."""

import asyncio
import functools
import threading

import pytest

from rloo_fast.rewards import RewardError, RewardTimeout, load_reward_functions
from tests.support.rewards import (
    COMPLETIONS,
    IDS,
    NAN,
    PROMPTS,
    assert_same,
    returns,
    score,
)


class AsyncJudge:
    async def __call__(self, completions, **kwargs):
        await asyncio.sleep(0)
        return [float(len(c)) for c in completions]


async def async_length(completions, scale=1.0, **kwargs):
    await asyncio.sleep(0)
    return (scale * len(c) for c in completions)


@pytest.mark.parametrize(
    "judge",
    [
        async_length,
        AsyncJudge(),
        AsyncJudge().__call__,
        functools.partial(functools.partial(async_length), scale=1.0),
    ],
    ids=["function", "object", "method", "partial"],
)
def test_async_callables_are_awaited(judge):
    assert_same(score(judge), [[3.0], [5.0], [4.0]])


def test_async_functions_run_at_the_same_time():
    meeting = asyncio.Barrier(2)

    async def meets_the_other(**kwargs):
        async with asyncio.timeout(60):
            await meeting.wait()
        return [0.0] * 3

    score([meets_the_other, meets_the_other])


def test_async_functions_run_on_one_daemon_thread_that_close_ends():
    async def thread(**kwargs):
        seen.append(threading.current_thread())
        return [0.0] * 3

    seen = []
    rewards = load_reward_functions([thread, thread])
    rewards(PROMPTS, COMPLETIONS, IDS, {})
    rewards(PROMPTS, COMPLETIONS, IDS, {})
    rewards.close()
    assert len(set(seen)) == 1
    assert seen[0].daemon
    assert not seen[0].is_alive()


def test_closed_rewards_can_be_used_again():
    rewards = load_reward_functions(AsyncJudge())
    rewards(PROMPTS, COMPLETIONS, IDS, {})
    rewards.close()
    assert_same(rewards(PROMPTS, COMPLETIONS, IDS, {}), [[3.0], [5.0], [4.0]])
    rewards.close()


@pytest.mark.parametrize("error", [KeyError("gold"), SystemExit(1), asyncio.CancelledError()])
def test_raising_async_function_is_named(error):
    async def broken(**kwargs):
        raise error

    with pytest.raises(RewardError, match=f"'broken' raised {type(error).__name__}"):
        score(broken)


def test_failure_cancels_the_async_functions_that_still_run():
    cancelled = threading.Event()

    async def slow(**kwargs):
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    rewards = load_reward_functions([slow, returns(None)])
    with pytest.raises(ValueError, match="'fixed' must return"):
        rewards(PROMPTS, COMPLETIONS, IDS, {})
    assert cancelled.wait(60)
    rewards.close()


def test_hidden_coroutine_is_refused_with_the_fix():
    with pytest.raises(ValueError, match=r"got coroutine.*async def"):
        score(lambda **kwargs: async_length(**kwargs))


# --- time limits


def test_hung_function_times_out():
    release, released = threading.Event(), []

    def hung(**kwargs):
        released.append(release.wait(60))

    with pytest.raises(RewardTimeout, match=r"'hung' still ran after 0\.2 s"):
        score([returns([0, 0, 0]), hung], timeout_s=0.2)
    assert not released
    release.set()


def test_hung_async_function_times_out():
    async def hung(**kwargs):
        await asyncio.sleep(30)

    async def quick(**kwargs):
        return [0.0] * 3

    with pytest.raises(RewardTimeout, match=r"function 'hung' still ran after 0\.2 s on sample 0 "):
        score([hung, quick], timeout_s=0.2)


def test_async_function_that_blocks_the_loop_times_out():
    release = threading.Event()

    async def blocking(**kwargs):
        release.wait(30)

    with pytest.raises(RewardTimeout, match=r"'blocking' still ran.*blocking work"):
        score(blocking, timeout_s=0.2)
    release.set()


def test_functions_own_timeout_error_is_not_taken_for_ours():
    async def client(**kwargs):
        raise TimeoutError("server")

    with pytest.raises(RewardError, match="'client' raised TimeoutError: server") as info:
        score(client, timeout_s=30.0)
    assert not isinstance(info.value, RewardTimeout)


def test_functions_in_time_return_and_raise_as_without_limit():
    def broken(**kwargs):
        raise KeyError("gold")

    assert_same(
        score([returns([1, 2, None]), AsyncJudge()], timeout_s=30.0),
        [
            [1.0, 3.0],
            [2.0, 5.0],
            [NAN, 4.0],
        ],
    )
    with pytest.raises(RewardError, match="'broken' raised KeyError"):
        score(broken, timeout_s=30.0)


def test_time_limit_must_be_positive():
    with pytest.raises(ValueError, match="> 0 seconds or None, got 0"):
        load_reward_functions(returns([]), timeout_s=0)
