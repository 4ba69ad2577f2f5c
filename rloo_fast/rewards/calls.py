"""Running reward functions: time limits, threads, and the event loop of the async ones."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch

# Beyond the time limit: what an event loop gets to notice by itself that the time is up.
GRACE_S = 1.0


class RewardError(RuntimeError):
    """A reward function or reward model failed; the message names it, `__cause__` is its error."""


class RewardTimeout(RewardError):
    """A reward function was still running after `timeout_s` seconds."""


class Log:
    """What one call of a reward function gave to log_extra and log_metric."""

    def __init__(self) -> None:
        self.extra: dict[str, list[Any]] = {}
        self.metrics: list[tuple[str, float]] = []

    def keywords(self) -> dict[str, Callable[..., None]]:
        return {"log_extra": self._add_extra, "log_metric": self._add_metric}

    def _add_extra(self, name: str, values: Iterable[Any]) -> None:
        self.extra.setdefault(name, []).extend(values)

    def _add_metric(self, name: str, value: float) -> None:
        self.metrics.append((name, float(value)))


class Caller:
    """Calls functions with keywords; whatever they raise becomes a RewardError with their name.

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

    def call(self, function: Callable[..., Any], name: str, keywords: dict[str, Any]) -> Any:
        """What a synchronous function returns."""

        def run() -> Any:
            return drain(function(**keywords), len(keywords["completions"]))

        try:
            if self.timeout_s is None:
                return run()
            future = _in_thread(run, f"reward-{name}")
            if concurrent.futures.wait([future], self.timeout_s).done:
                return future.result()
        except Exception as error:
            raise failed(name, error) from error
        raise timed_out([name], self.timeout_s)

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
            raise timed_out(stuck, self.timeout_s, in_loop=True)
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
        try:
            async with limit:
                return drain(await function(**keywords), len(keywords["completions"]))
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # SystemExit too: it would end the loop without a word
            if self.timeout_s is not None and limit.expired():
                raise timed_out([name], self.timeout_s) from error
            raise failed(name, error) from error


def failed(name: str, error: BaseException) -> RewardError:
    return RewardError(f"Reward function {name!r} raised {type(error).__name__}: {error}")


def timed_out(names: list[str], timeout_s: float, in_loop: bool = False) -> RewardTimeout:
    which = ", ".join(map(repr, names))
    why = ""
    if in_loop:
        why = (
            " and did not stop when cancelled. If an async function does blocking work, use an "
            "async client or asyncio.to_thread, or write it without `async`"
        )
    return RewardTimeout(f"Reward function {which} still ran after {timeout_s} s{why}.")


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


def _in_thread(run: Callable[[], Any], name: str) -> concurrent.futures.Future:
    future: concurrent.futures.Future = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(run())
        except BaseException as error:
            future.set_exception(error)

    daemon(work, name)
    return future


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
