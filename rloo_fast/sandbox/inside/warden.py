"""The process from which candidates and tests are forked: it never runs, nor reads, either.

    pool  -- limits; three files: program, test, result -->  warden  -- fork --> candidate, tester
    pool  -- limits; two files: program, result         -->  warden  -- fork --> script

It waits for the tester or the wall clock, kills both, and reports how they ended. Neither can start
a process, so these two are all there is to kill. So it does with a script, a program that is run
for what it prints. It ends with the pool, whatever ends that.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from . import candidate, jail, script, tester
from .jail import Limits

TICK_S = 0.02  # between looks at a candidate's files
IDLE_S = 2.0  # between looks for the pool's process
COMMON = ("bisect", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq")
COMMON += ("itertools", "math", "operator", "re", "statistics", "string", "typing")


def main() -> None:
    """`python -c ... CONTROL FOLDER`: serve the socket with number CONTROL until it is closed.

    The first message says what this machine gives: {"namespaces": bool, "disk": is it bounded by
    the kernel, "error": str}.
    """
    control = socket.socket(fileno=int(sys.argv[1]))
    for name in COMMON:  # once here, instead of in every process
        importlib.import_module(name)
    namespaces = jail.leave_namespaces()
    warden = Warden(control, sys.argv[2], namespaces)
    hello = {"namespaces": namespaces, "disk": warden.bounds_disk(), "error": probe()}
    control.send(json.dumps(hello).encode())
    gc.freeze()  # forked processes then leave these pages as they are
    with suppress(ConnectionError):
        while warden.serve_one():
            pass


def probe() -> str:
    """Why a process cannot be shut in here; "" if it can."""
    inner, outer = os.pipe()
    warden = os.getpid()

    def shut_in() -> None:
        try:
            jail.enter(Limits(), [outer], None, warden)
        except OSError as error:
            os.write(outer, str(error).encode())

    pid = _fork(shut_in)
    os.close(outer)
    error = os.read(inner, 4096).decode()
    os.close(inner)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return error or ("" if status == 0 else f"a process in it ended with status {status}")


class Warden:
    """`folder`: where the temporary directories of candidates are made.

    With `namespaces` of its own, each of them is a file system of the size allowed, if it can be.
    """

    def __init__(self, control: socket.socket, folder: str, namespaces: bool) -> None:
        self._control, self._folder, self._namespaces = control, folder, namespaces
        self._pid, self._pool = os.getpid(), os.getppid()

    def bounds_disk(self) -> bool:
        """Whether the kernel bounds what a candidate writes, or only the warden's look at it."""
        bounded = self._namespaces and jail.bound_disk(self._folder, Limits())
        if bounded:
            jail.unbound_disk(self._folder)
        return bounded

    def serve_one(self) -> bool:
        """Wait for a job and do it; False at the end of the pool."""
        while not select.select([self._control], [], [], IDLE_S)[0]:
            if os.getppid() != self._pool:  # a copy of it may hold the other end of the socket
                return False
        message, files, _, _ = socket.recv_fds(self._control, 4096, 3)
        if not message:
            return False
        try:
            run = self._run if len(files) == 3 else self._run_script
            report = run(Limits(**json.loads(message)), *files)
        finally:
            for file in files:
                os.close(file)
        self._control.send(json.dumps(report).encode())
        return True

    def _run(self, limits: Limits, program: int, test: int, result: int) -> dict[str, Any]:
        """{"ended": "" | "timeout" | "disk", the two exit statuses: -N where signal N killed}."""
        asked, ask = os.pipe()
        answered, answer = os.pipe()

        def run_candidate(folder: str) -> None:
            jail.enter(limits, [program, asked, answer], folder, self._pid)
            job = _read_once(program)
            random.seed(0)
            candidate.run(job, asked, answer)

        def run_tester(folder: str) -> None:
            jail.enter(limits, [test, result, ask, answered], None, self._pid)
            random.seed(0)
            tester.run(_read_once(test), result, ask, answered)

        pipes = (asked, ask, answered, answer)
        ended, statuses = self._fork_and_watch([run_candidate, run_tester], limits, pipes)
        return {"ended": ended, "candidate": statuses[0], "tester": statuses[1]}

    def _run_script(self, limits: Limits, program: int, result: int) -> dict[str, Any]:
        """{"ended" as above, "script": its exit status}."""

        def run(folder: str) -> None:
            jail.enter(limits, [program, result], folder, self._pid)
            random.seed(0)
            script.run(_read_once(program), result)

        ended, statuses = self._fork_and_watch([run], limits)
        return {"ended": ended, "script": statuses[0]}

    def _fork_and_watch(
        self, runs: list[Callable[[str], None]], limits: Limits, pipes: tuple[int, ...] = ()
    ) -> tuple[str, list[int]]:
        """A process for each, until the last one ends. `pipes` are theirs alone."""
        folder = f"{self._folder}/{self._pid}"
        os.mkdir(folder, 0o700)
        bounded = self._namespaces and jail.bound_disk(folder, limits)
        pids = [_fork(partial(run, folder)) for run in runs]
        for pipe in pipes:
            os.close(pipe)
        try:
            ended = self._watch(pids[-1], folder, limits)
        finally:
            statuses = [_kill(pid) for pid in pids]
            if bounded:
                jail.unbound_disk(folder)
            for name in os.listdir(folder):
                os.unlink(f"{folder}/{name}")
            os.rmdir(folder)
        return ended, statuses

    def _watch(self, pid: int, folder: str, limits: Limits) -> str:
        """Until this process ends; the tester does with the candidate."""
        deadline = time.monotonic() + limits.time_s
        process = os.pidfd_open(pid)
        try:
            while (left := deadline - time.monotonic()) > 0:
                tick = min(TICK_S, left)
                if process in select.select([process], [], [], tick)[0]:
                    return ""
                if _too_much(folder, limits):
                    return "disk"
                if os.getppid() != self._pool or _hung_up(self._control):
                    raise ConnectionError("the pool has ended")
            return "timeout"
        finally:
            os.close(process)


def _fork(run: Callable[[], None]) -> int:
    """The pid of a process that does `run` and no more."""
    if pid := os.fork():
        return pid
    status = 1  # of a process that could not shut itself in, and so ran nothing
    try:
        run()
        status = 0
    finally:
        os._exit(status)


def _kill(pid: int) -> int:
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _read_once(file: int) -> dict[str, str]:
    """The job in a file, of which nothing is left for others."""
    job = json.loads(os.pread(file, os.fstat(file).st_size, 0))
    os.close(file)
    return job


def _too_much(folder: str, limits: Limits) -> bool:
    """Folders and removals are refused, so that all a candidate has written is listed there."""
    used, num_files = 0, 0
    with os.scandir(folder) as entries:
        for entry in entries:
            used += entry.stat(follow_symlinks=False).st_blocks * 512
            num_files += 1
            if num_files > limits.num_files or used > limits.disk_mib * 2**20:
                return True
    return False


def _hung_up(control: socket.socket) -> bool:
    poll = select.poll()
    poll.register(control, select.POLLHUP)
    return bool(poll.poll(0))
