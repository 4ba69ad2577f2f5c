"""Calls that end in time: synchronous functions in threads, async ones on one event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple

from ..rewards.calls import daemon
from .threads import Job, Threads

LOOP_ANSWERS_S = 0.5  # an event loop that takes longer is blocked by something that runs on it


class ToolTimeout(TimeoutError):
    """A call took longer than its time limit, and was given up."""


class CallDropped(RuntimeError):
    """The threads were ended before a call had begun."""


class _Call(NamedTuple):
    """`run()` is the function's call; the future gets what comes of it, unless it was given up."""

    future: Future[Any]
    run: Callable[[], Any]
    name: str
    limit_s: float | None

    def drop(self) -> None:
        with suppress(InvalidStateError):
            self.future.set_exception(CallDropped(f"{self.name} was not called: the run has ended"))

    def settle(self) -> None:
        try:
            value = self.run()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: it would end the thread without a word
            with suppress(InvalidStateError):
                self.future.set_exception(error)
        else:
            with suppress(InvalidStateError):
                self.future.set_result(value)

    async def settle_async(self) -> None:
        try:
            value = await self.run()
        except BaseException as error:
            with suppress(InvalidStateError):
                self.future.set_exception(error)
        else:
            with suppress(InvalidStateError):
                self.future.set_result(value)


class _Running(NamedTuple):
    """A call that has begun. `give_up()` lets go of what still works on it."""

    call: _Call
    deadline: float
    give_up: Callable[[], None]


class Caller:
    """Starts calls, each of which has a result within `timeout_s` (None: whenever it has).

    Synchronous functions run in at most `threads` threads, those of the same `lane` one after
    another; 0: in the thread that starts them, without a limit. Async ones run on one event loop
    thread, at the same time. A call whose time is up ends with ToolTimeout; its thread is left
    behind (an async one is cancelled, and its loop replaced where that does not help). All threads
    are daemons.
    """

    def __init__(self, timeout_s: float | None, threads: int):
        self.timeout_s = timeout_s
        self._threads = Threads(threads, "tool") if threads else None
        self._lanes: dict[Any, Future[Any]] = {}  # the newest call of each that has not ended
        self._running: SimpleQueue[_Running | None] = SimpleQueue()  # oldest first
        self._watcher: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self.num_loops_left = 0

    @property
    def num_left_behind(self) -> int:
        """Threads that still run a call that was given up."""
        return self.num_loops_left + (self._threads.num_hung if self._threads else 0)

    def start(
        self,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        *,
        name: str,
        is_async: bool,
        is_limited: bool = True,
        lane: Any = None,
    ) -> Future[Any]:
        """What function(**arguments) returns or raises, SystemExit too."""
        future: Future[Any] = Future()
        limit = self.timeout_s if is_limited else None
        call = _Call(future, lambda: function(**arguments), name, limit)
        if is_async:
            self._start_in_loop(call)
        elif self._threads is None:
            call.settle()
        else:
            self._enter_lane(lane, call, partial(self._start_in_thread, call, self._threads))
        return future

    def close(self) -> None:
        """End the threads that have nothing to do; calls that none has begun end with CallDropped.
        A later `start` starts new ones."""
        with self._lock:
            if self._watcher is not None:
                self._running.put(None)
            loop, self._loop, self._watcher = self._loop, None, None
        if loop is not None:
            loop.call_soon_threadsafe(loop.stop)
        if self._threads is not None:
            self._threads.close()

    def _enter_lane(self, lane: Any, call: _Call, begin: Callable[[], None]) -> None:
        """`begin()` once the call before it in the lane has ended, or was given up; it is dropped
        with that."""
        if lane is None:
            begin()
            return
        with self._lock:
            before = self._lanes.get(lane)
            self._lanes[lane] = call.future
        call.future.add_done_callback(lambda done: self._leave_lane(lane, done))
        if before is None:
            begin()
        else:
            before.add_done_callback(
                lambda done: call.drop() if isinstance(done.exception(), CallDropped) else begin()
            )

    def _leave_lane(self, lane: Any, done: Future[Any]) -> None:
        with self._lock:
            if self._lanes.get(lane) is done:
                del self._lanes[lane]

    def _start_in_thread(self, call: _Call, threads: Threads) -> None:
        def run(job: Job) -> None:
            self._watch(call, lambda: threads.give_up(job))
            call.settle()

        threads.submit(run, call.drop)

    def _start_in_loop(self, call: _Call) -> None:
        loop = self._event_loop()
        task = asyncio.run_coroutine_threadsafe(call.settle_async(), loop)
        self._watch(call, lambda: self._give_up_task(loop, task))

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                loop = self._loop = asyncio.new_event_loop()
                daemon(lambda: _serve(loop), "tools-event-loop")
            return self._loop

    def _give_up_task(self, loop: asyncio.AbstractEventLoop, task: Future[Any]) -> None:
        """Cancel it; a loop that does not answer is blocked by something on it, and replaced."""
        task.cancel()
        answers = threading.Event()
        with suppress(RuntimeError):  # the loop was closed
            loop.call_soon_threadsafe(answers.set)
        if not answers.wait(LOOP_ANSWERS_S):
            with self._lock:
                if self._loop is loop:
                    self._loop = None
                    self.num_loops_left += 1

    # The watcher: limits are the same for all, so that the oldest call is the first to be late

    def _watch(self, call: _Call, give_up: Callable[[], None]) -> None:
        if call.limit_s is None:
            return
        with self._lock:
            if self._watcher is None:
                calls = self._running = SimpleQueue()
                self._watcher = daemon(lambda: _end_late_calls(calls), "tools-time-limits")
            self._running.put(_Running(call, time.monotonic() + call.limit_s, give_up))


def _end_late_calls(running: SimpleQueue[_Running | None]) -> None:
    while (late := running.get()) is not None:
        call, left = late.call, late.deadline - time.monotonic()
        if concurrent.futures.wait([call.future], max(left, 0.0)).done:
            continue
        error = ToolTimeout(f"{call.name} did not return within {call.limit_s:g} s")
        with suppress(InvalidStateError):  # it has, at the last moment
            call.future.set_exception(error)
            late.give_up()


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()
