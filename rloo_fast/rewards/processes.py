"""Reward functions in processes of their own, so that sampling does not wait for them.

A thread here and a process there form a pair: the thread sends one call, waits for the answer, and
kills the process if none comes in time. So a stuck or dying call is known by name, and no other
call loses its process.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import functools
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from ..config.code_files import run_file
from .calls import Log, RewardError, WorkerDied, daemon, drain, failed, timed_out
from .copies import call_with_copies
from .files import files_of
from .values import read_values

SAFE_PATH = "PYTHONSAFEPATH"
START_LIMIT_S = 300.0  # a process imports torch and the modules of the functions


@dataclass
class Failure:
    """What goes back in place of rewards: `raise error from cause`."""

    error: Exception
    cause: BaseException | None = None


class Worker:
    """A process that calls reward functions one at a time. It starts with the first call."""

    def __init__(self, payload: bytes, timeout_s: float | None) -> None:
        self._payload, self.timeout_s = payload, timeout_s
        self._process: Any = None
        self._connection: Connection | None = None
        self._state: bytes | None = None  # the trainer_state that the process has
        self._lock = threading.Lock()  # held to start or kill it
        self._closed = False

    def call(
        self, name: str, rows: Sequence[int], keywords: dict[str, Any], state: bytes
    ) -> tuple[Tensor, Log]:
        """The rewards of `rows`, whose keywords these are; `state`: the pickled trainer_state."""
        connection = self._connection or self._start()
        news = None if state is self._state else state
        message = pickle.dumps((name, rows, keywords, news))
        try:
            connection.send_bytes(message)
            self._state = state
            answered = connection.poll(self.timeout_s)
            answer = pickle.loads(connection.recv_bytes()) if answered else None
        except (EOFError, OSError) as error:
            if self._closed:
                raise RewardError("The rewards were closed.") from error
            raise WorkerDied(
                f"The worker process of reward function {name!r} died ({self.end()})"
            ) from error
        if answer is None:
            self.end()
            assert self.timeout_s is not None
            raise timed_out([name], self.timeout_s)
        if isinstance(answer, Failure):
            raise answer.error from answer.cause
        return answer

    def close(self) -> None:
        """Kill the process, from any thread, and never start another."""
        self._closed = True
        self._kill()

    def end(self) -> str:
        """Kill the process, and say how it ended. The next call starts another."""
        self._kill()
        process, connection = self._process, self._connection
        self._process = self._connection = self._state = None
        if connection is not None:
            connection.close()
        if process is None:
            return "not started"
        process.join()
        hint = ", often for lack of memory" if process.exitcode == -signal.SIGKILL else ""
        return f"exit code {process.exitcode}{hint}"

    def _start(self) -> Connection:
        # a plain fork would copy locks and the GPU's state; the server imports torch once for all
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._connection, theirs = context.Pipe()
        with self._lock:
            if self._closed:
                raise RewardError("The rewards were closed.")
            safe_path = os.environ.get(SAFE_PATH)
            arguments = (theirs, self._payload, safe_path)
            self._process = context.Process(target=_serve, args=arguments)
            # the server's Python would look for its own modules in the working directory first
            os.environ[SAFE_PATH] = "1"
            try:
                self._process.start()
            finally:
                _restore(safe_path)
        theirs.close()
        problem = "it did not answer"
        with suppress(EOFError, OSError):
            if self._connection.poll(START_LIMIT_S):
                problem = pickle.loads(self._connection.recv_bytes())
        if problem is not None:
            raise RewardError(
                f"A worker process for the reward functions did not start: {problem} "
                f"({self.end()}). It imports the script that is run, which therefore must start "
                'training under `if __name__ == "__main__":`. Or set reward_processes=0.'
            )
        return self._connection

    def _kill(self) -> None:
        with self._lock:
            if self._process is not None:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)  # what it has started, too
                self._process.kill()


class Pool:
    """`count` workers for `functions`, by name; they start with the first call.

    Raises ValueError for a function that cannot be sent to another process.
    """

    def __init__(
        self, functions: Mapping[str, Callable[..., Any]], count: int, timeout_s: float | None
    ) -> None:
        pickled = {name: _pickled(function, name) for name, function in functions.items()}
        self._payload = pickle.dumps((files_of(functions.values()), pickled))
        self._count, self._timeout_s = count, timeout_s
        self._owner = os.getpid()
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._pairs: list[tuple[Worker, threading.Thread]] = []

    def submit(self, task: Callable[[Worker], None]) -> concurrent.futures.Future:
        """Calls task(worker), in a thread, as soon as a worker is free."""
        self._forget_if_forked()
        if not self._pairs:
            atexit.register(self.close)  # multiprocessing would wait for the processes
            for _ in range(self._count):
                worker = Worker(self._payload, self._timeout_s)
                drive = functools.partial(_drive, worker, self._tasks)
                self._pairs.append((worker, daemon(drive, "rewards-process")))
        future: concurrent.futures.Future = concurrent.futures.Future()
        self._tasks.put((future, task))
        return future

    def close(self) -> None:
        """Kill the processes, whatever they do. A later `submit` starts new ones."""
        atexit.unregister(self.close)
        self._forget_if_forked()
        pairs, tasks = self._pairs, self._tasks
        self._pairs, self._tasks = [], queue.SimpleQueue()
        with suppress(queue.Empty):
            while True:
                tasks.get_nowait()[0].cancel()
        for worker, _ in pairs:
            tasks.put(None)
            worker.close()
        for _, thread in pairs:
            thread.join()

    def _forget_if_forked(self) -> None:
        """Threads are not forked, and the processes are another's."""
        if self._owner != os.getpid():
            self._owner, self._pairs, self._tasks = os.getpid(), [], queue.SimpleQueue()


def _drive(worker: Worker, tasks: queue.SimpleQueue) -> None:
    while (item := tasks.get()) is not None:
        future, task = item
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(task(worker))
        except BaseException as error:
            future.set_exception(error)
    worker.end()


def _pickled(function: Callable[..., Any], name: str) -> bytes:
    try:
        return pickle.dumps(function)
    except Exception as error:  # pickle raises several kinds
        raise ValueError(
            f"Reward function {name!r} cannot be sent to a worker process ({error}): define it at "
            "the top level of a module or file, or set reward_processes=0."
        ) from error


# In the worker process


def _restore(safe_path: str | None) -> None:
    os.environ.pop(SAFE_PATH, None)
    if safe_path is not None:
        os.environ[SAFE_PATH] = safe_path


def _serve(connection: Connection, payload: bytes, safe_path: str | None) -> None:
    _restore(safe_path)
    os.setsid()  # Ctrl-C is for the trainer, which ends this; what a function starts ends with it
    torch.set_num_threads(1)  # there are other processes
    functions: dict[str, Callable[..., Any]] = {}
    problem, loading = None, "files"
    try:
        files, pickled = pickle.loads(payload)
        for name, path in files.items():
            run_file(name, path)
        for loading, function in pickled.items():
            functions[loading] = pickle.loads(function)
    except BaseException as error:
        problem = f"loading {loading!r}, {type(error).__name__}: {error}"
    connection.send_bytes(pickle.dumps(problem))
    state, mine = None, os.getpid()
    with suppress(EOFError):  # the trainer has ended
        while True:
            name, rows, keywords, news = pickle.loads(connection.recv_bytes())
            state = state if news is None else pickle.loads(news)
            keywords["trainer_state"] = state
            answer = _answer(functions[name], name, rows, keywords)
            if os.getpid() != mine:  # the function forked: a second answer would be the next call's
                os._exit(0)
            connection.send_bytes(answer)


def _answer(
    function: Callable[..., Any], name: str, rows: Sequence[int], keywords: dict[str, Any]
) -> bytes:
    """Pickled: (rewards, log) or a Failure."""
    prompts, completions, log = keywords["prompts"], keywords["completions"], Log()
    try:
        values = drain(call_with_copies(function, keywords | log.keywords()), len(completions))
    except BaseException as error:
        failure = Failure(failed(name, error), _sendable(error))
        failure.error.add_note(f"In the worker process:\n{traceback.format_exc()}")
        return pickle.dumps(failure)
    try:
        return pickle.dumps((read_values(values, name, prompts, completions, rows), log))
    except ValueError as error:
        return pickle.dumps(Failure(error))
    except Exception as error:  # what was logged cannot be pickled
        return pickle.dumps(Failure(failed(name, error)))


def _sendable(error: BaseException) -> BaseException | None:
    """None for an error that pickle cannot take apart and build again."""
    with suppress(Exception):
        return pickle.loads(pickle.dumps(error))
    return None
