"""Running reward functions: time limits, threads, and the event loop of the async ones."""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch

from ..records import Count
from .copies import call_with_copies, fresh
from .watchdog import named, watched

# Seconds beyond the time limit for the event loop to notice by itself that the time is up.
GRACE_S = 1.0
STACK_LINES = 8  # of the function that did not come back
LOOP_HINT = (
    " It did not stop when cancelled: if an async function does blocking work, use an async client "
    "or asyncio.to_thread, or write it without `async`."
)
THREAD_HINT = (
    " In this process it cannot be ended: with reward_processes=1 it is, and reward_over_limit may "
    "then score such a completion and go on."
)


class RewardError(RuntimeError):
    """A reward function or reward model failed; the message names it, `__cause__` is its error."""


class CallEnded(RewardError):
    """A call of a reward function was given up: `what` happened, and what there is to do."""

    def __init__(self, what: str, hint: str = "", samples: str = "") -> None:
        super().__init__(f"{what}{samples}.{hint}")
        self.what, self.hint = what, hint

    def on(self, samples: str) -> CallEnded:
        """The same, said of these samples."""
        error = type(self)(self.what, self.hint, samples)
        for note in getattr(self, "__notes__", ()):
            error.add_note(note)
        return error


class RewardTimeout(CallEnded):
    """A reward function was still running after `timeout_s` seconds."""


class LoopBlocked(RewardTimeout):
    """An async function was, and could not be cancelled."""


class WorkerDied(CallEnded):
    """The process that a reward function ran in is dead."""


class Log:
    """What one call of a reward function gave to log_extra and log_metric."""

    def __init__(self) -> None:
        self.extra: dict[str, list[Any]] = {}
        self.metrics: list[tuple[str, float]] = []

    def keywords(self) -> dict[str, Callable[..., None]]:
        return {"log_extra": self._add_extra, "log_metric": self._add_metric}

    def _add_extra(self, name: str, values: Iterable[Any]) -> None:
        self.extra.setdefault(name, []).extend(fresh(value) for value in values)

    def _add_metric(self, name: str, value: float) -> None:
        self.metrics.append((name, value if isinstance(value, Count) else float(value)))


class Caller:
    """Calls functions with keywords; whatever they raise becomes a RewardError with their name.

    A function gets copies of the values, and may change them.
    With `timeout_s`, a synchronous function runs in a daemon thread of its own, which is left
    behind when its time is up (Python cannot stop it). Async functions share one daemon thread with
    an event loop, started by the first of them.
    """

    def __init__(self, timeout_s: float | None) -> None:
        if timeout_s is not None and timeout_s <= 0:
            raise ValueError(f"The reward timeout must be > 0 seconds or None, got {timeout_s}.")
        self.timeout_s = timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._calling = threading.Lock()  # several batches may be scored at a time

    def call(self, function: Callable[..., Any], name: str, keywords: dict[str, Any]) -> Any:
        """Call a synchronous function and return its result; one at a time runs in this process."""
        with self._calling:
            return self._call(function, name, keywords)

    def _call(self, function: Callable[..., Any], name: str, keywords: dict[str, Any]) -> Any:
        def run() -> Any:
            return drain(call_with_copies(function, keywords), num_completions)

        num_completions = len(keywords["completions"])
        try:
            if self.timeout_s is None:
                return run()
            # before the thread starts: from then on it may be the only one that runs
            with watched(self.timeout_s + GRACE_S):
                future, thread = _in_thread(
                    named(run, _call_name(name, keywords)), f"reward-{name}"
                )
                if concurrent.futures.wait([future], self.timeout_s).done:
                    return future.result()
        except Exception as error:
            raise failed(name, error) from error
        error = timed_out([name], self.timeout_s, THREAD_HINT)
        error.add_note(f"It is at:\n{_stack(thread)}")
        raise error

    def start(
        self, function: Callable[..., Any], name: str, keywords: dict[str, Any]
    ) -> concurrent.futures.Future:
        """Hand an async function to the event loop; `wait` gets what it returns."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = daemon(lambda loop=self._loop: _serve(loop), "rewards-event-loop")
        coroutine = self._limited(function, name, keywords)
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def wait(self, name: str, running: dict[str, concurrent.futures.Future], started: float) -> Any:
        """The result of `running[name]`, started at time.monotonic() == `started`."""
        left = None  # the loop enforces the limit itself, unless something blocks it
        if self.timeout_s is not None:
            left = max(0.0, started + self.timeout_s + GRACE_S - time.monotonic())
        if not concurrent.futures.wait([running[name]], left).done:
            assert self.timeout_s is not None
            self.close(join_s=0.0)
            stuck = [other for other, future in running.items() if not future.done()]
            raise LoopBlocked(timed_out(stuck, self.timeout_s).what, LOOP_HINT)
        try:
            return running[name].result()
        except concurrent.futures.CancelledError as error:  # by the function itself
            raise failed(name, error) from error

    def close(self, join_s: float = GRACE_S) -> None:
        """Stop the event loop and its thread. A later `start` starts new ones."""
        if self._loop is None or self._thread is None:
            return
        asyncio.run_coroutine_threadsafe(_stop(), self._loop)
        self._thread.join(join_s)
        self._loop = self._thread = None

    async def _limited(
        self, function: Callable[..., Any], name: str, keywords: dict[str, Any]
    ) -> Any:
        limit = asyncio.timeout(self.timeout_s)
        alarm = nullcontext() if self.timeout_s is None else watched(self.timeout_s + 2 * GRACE_S)
        try:
            with alarm:
                async with limit:
                    num_completions = len(keywords["completions"])
                    return drain(await call_with_copies(function, keywords), num_completions)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # SystemExit too: it would end the loop without a word
            if self.timeout_s is not None and limit.expired():
                raise timed_out([name], self.timeout_s) from error
            raise failed(name, error) from error


def failed(name: str, error: BaseException) -> RewardError:
    return RewardError(f"Reward function {name!r} raised {type(error).__name__}: {error}")


def timed_out(names: list[str], timeout_s: float, hint: str = "") -> RewardTimeout:
    which = ", ".join(map(repr, names))
    return RewardTimeout(f"Reward function {which} still ran after {timeout_s} s", hint)


def drain(values: Any, count: int) -> Any:
    """A generator runs here, as part of its function; one value too many is enough to tell."""
    return list(islice(values, count + 1)) if isinstance(values, Iterator) else values


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()


async def _stop() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    asyncio.get_running_loop().stop()


def _in_thread(
    run: Callable[[], Any], name: str
) -> tuple[concurrent.futures.Future, threading.Thread]:
    future: concurrent.futures.Future = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(run())
        except BaseException as error:
            future.set_exception(error)

    return future, daemon(work, name)


def _call_name(name: str, keywords: dict[str, Any]) -> str:
    """What the watchdog shows of the call."""
    first = [str(keywords[kind][0])[:100] for kind in ("prompts", "completions")]
    count = len(keywords["completions"])
    return f"reward function {name!r}, {count} completions, the first {first[1]!r} to {first[0]!r}"


def _stack(thread: threading.Thread) -> str:
    """Where the thread is now."""
    frame = sys._current_frames().get(thread.ident or 0)
    return "" if frame is None else "".join(traceback.format_stack(frame)[-STACK_LINES:])


def daemon(target: Callable[[], Any], name: str) -> threading.Thread:
    """A thread that does not keep the process alive, on the GPU of the thread that starts it."""
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        if device is not None:
            torch.cuda.set_device(device)  # the current device belongs to a thread
        target()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread
