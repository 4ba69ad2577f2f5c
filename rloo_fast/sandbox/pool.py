"""Verdicts on several programs at a time; the same program and tests are run once."""

from __future__ import annotations

import logging
import os
import queue
import signal
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .client import SandboxError, Warden, unsuited
from .inside.jail import Limits

logger = logging.getLogger(__name__)

MAX_CACHED = 4096  # verdicts
MAX_DEFAULT_WORKERS = 16
SIGNALS = {
    -signal.SIGSYS: "forbidden system call",
    -signal.SIGSEGV: "crashed",
    -signal.SIGXCPU: "timeout",
}
END_LIMIT_S = 2.0  # for a thread; its processes end with this one at the latest
TRANSIENT = ("timeout", "crashed", "ended")  # the load of the machine may have caused these

Question = tuple[str, tuple[str, ...], str]  # program, tests, setup
Task = Callable[[Warden], Any]
Jobs = queue.SimpleQueue  # of (Future, Task), None: the end


@dataclass(frozen=True)
class Verdict:
    """How many tests passed, and why the first of the others did not ("" if all did)."""

    passed: int
    total: int
    why: str

    def __str__(self) -> str:
        return f"passed {self.passed}/{self.total}" + (f": {self.why}" if self.why else "")


@dataclass(frozen=True)
class Output:
    """What a program printed, a traceback included, and why it was ended ("" if it was not)."""

    text: str
    why: str


class Sandbox:
    """Checks programs by tests, or runs them for what they print, `workers` at a time (default:
    this process's share of the cores).

    `timeout_s` is a program's, shared equally by its tests; `memory_mib` that of a process;
    `disk_mib` that of all the files it writes. Processes start with the first program and end with
    `close`, or with this object, or with the process that owns it.
    """

    def __init__(
        self,
        *,
        timeout_s: float = 10.0,
        memory_mib: int = 512,
        disk_mib: int = 8,
        workers: int | None = None,
    ) -> None:
        if why := unsuited():
            raise SandboxError(why)
        workers = _default_workers() if workers is None else workers
        settings = {"timeout_s": timeout_s, "memory_mib": memory_mib, "disk_mib": disk_mib}
        for name, value in (settings | {"workers": workers}).items():
            if value <= 0:
                raise ValueError(f"The sandbox's {name} must be > 0, got {value}.")
        self._jobs: Jobs = queue.SimpleQueue()
        self._limits = Limits(timeout_s, memory_mib, disk_mib)
        self._threads = [
            threading.Thread(target=_work, args=(self._jobs,), name=f"sandbox-{n}", daemon=True)
            for n in range(workers)
        ]
        self._started = False
        self._verdicts: OrderedDict[Question, Future[Verdict]] = OrderedDict()
        self._lock = threading.Lock()
        self._end = weakref.finalize(self, _end, self._jobs, self._threads)

    def check(self, program: str, tests: Sequence[str], setup: str = "") -> Verdict:
        """`setup` is code that the tests need; it is run before them, and before the program.

        Raises SandboxError where this machine cannot shut a program in.
        """
        return self.submit(program, tests, setup).result()

    def submit(self, program: str, tests: Sequence[str], setup: str = "") -> Future[Verdict]:
        """The same in the background. The same question again gets the same future."""
        if isinstance(tests, str):
            raise ValueError(f"The tests are a list of strings, got one string: {tests!r:.80}.")
        if not tests:
            raise ValueError("A program is checked by at least one test, got none.")
        question = (program, tuple(tests), setup)
        with self._lock:
            self._start()
            if question in self._verdicts:
                self._verdicts.move_to_end(question)
                return self._verdicts[question]
            future = self._verdicts[question] = Future()
            if len(self._verdicts) > MAX_CACHED:
                self._verdicts.popitem(last=False)
        self._jobs.put((future, partial(_judge, question=question, limits=self._limits)))
        future.add_done_callback(lambda done: self._forget_transient(question, done))
        return future

    def run(self, program: str) -> Future[Output]:
        """Run a program for what it prints, in the background; every time anew.

        The future raises SandboxError where this machine cannot shut a program in.
        """
        with self._lock:
            self._start()
        future: Future[Output] = Future()
        self._jobs.put((future, partial(_run, program=program, limits=self._limits)))
        return future

    def _start(self) -> None:
        if not self._end.alive:
            raise SandboxError("This sandbox is closed.")
        if not self._started:
            self._started = True
            for thread in self._threads:
                thread.start()

    def close(self) -> None:
        """End the processes, once what they are at is done; what waits is cancelled."""
        self._end()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _forget_transient(self, question: Question, done: Future[Verdict]) -> None:
        if done.cancelled() or done.exception() or done.result().why in TRANSIENT:
            with self._lock:
                self._verdicts.pop(question, None)


def _default_workers() -> int:
    """A core each, of those that the ranks of this machine share."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(MAX_DEFAULT_WORKERS, max(1, len(os.sched_getaffinity(0)) // ranks))


def _work(jobs: Jobs) -> None:
    """A thread with a warden of its own, until it gets None. It must not hold the Sandbox."""
    warden = None
    while (job := jobs.get()) is not None:
        future, task = job
        if not future.set_running_or_notify_cancel():
            continue
        try:
            warden = warden or Warden()
            try:
                found = task(warden)
            except SandboxError as error:  # of a machine without memory, say: once more
                logger.warning("%s It is started anew, and the program run again.", error)
                warden = Warden()
                found = task(warden)
        except BaseException as error:
            warden = None
            future.set_exception(error)
        else:
            future.set_result(found)
    if warden is not None:
        warden.close()


def _judge(warden: Warden, question: Question, limits: Limits) -> Verdict:
    program, tests, setup = question
    share = replace(limits, time_s=limits.time_s / len(tests))
    passed, why = 0, ""
    for test in tests:
        # Processes of its own for every test: one that hangs costs no other its point.
        report = warden.run(program, test, setup, share)
        failure = _failure(report)
        passed += not failure
        why = why or failure
        if not report["loaded"]:
            break
    return Verdict(passed, len(tests), why)


def _run(warden: Warden, program: str, limits: Limits) -> Output:
    report, text = warden.run_script(program, limits)
    status = report["script"]
    why = report["ended"] or SIGNALS.get(status, f"ended by signal {-status}" if status < 0 else "")
    return Output(text, why)


def _failure(report: dict[str, Any]) -> str:
    """Why a test did not pass, "" if it did."""
    if report["ended"]:
        return report["ended"]
    for process in ("candidate", "tester"):
        if report[process] in SIGNALS:
            return SIGNALS[report[process]]
    if report["passed"] and report["tester"] == 0:
        return ""
    return report["why"] or "ended"


def _end(jobs: Jobs, threads: Sequence[threading.Thread]) -> None:
    with suppress(queue.Empty):
        while job := jobs.get_nowait():
            job[0].cancel()
    for _ in threads:
        jobs.put(None)
    for thread in threads:
        if thread.is_alive():
            thread.join(END_LIMIT_S)
