"""The trainer's side of the verifiers: jobs for workers, each watched by a thread."""

from __future__ import annotations

import atexit
import functools
import json
import os
import queue
import threading
import weakref
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .worker import Died, NoProcess, OverLimit, Source, VerifierError, Worker

MAX_WORKERS = 8
MAX_SENT = 16  # jobs that a worker is given at a time, and
MAX_SENT_BYTES = 2**20  # of them together: so it need not wait for this process after each
MAX_JOB_BYTES = 3 * 2**20  # a message has at most 4 MiB
END_LIMIT_S = 2.0  # for a thread whose process is dead
CLOSED = "The verifiers were closed."


class Verifiers:
    """Asks the verifier of this name (process.VERIFIERS) in `count` processes; default: this
    process's share of the cores.

    A job that takes more than `time_s`, or `memory_mib` beyond what is loaded, is ended with its
    process, and another one starts. A process that dies otherwise may have been killed by someone
    else: its job is done once more. Processes start with the first job and end with `close`. A
    process forked from this one has none of them, and starts its own.
    """

    def __init__(
        self,
        verifier: str,
        *,
        time_s: float = 5.0,
        memory_mib: int = 1024,
        count: int | None = None,
    ) -> None:
        if time_s <= 0:
            raise ValueError(f"The time limit of a verifier must be > 0 seconds, got {time_s}.")
        self.verifier, self.time_s, self.memory_mib = verifier, time_s, memory_mib
        self._count = _default_count() if count is None else count
        self.forget()
        _all.add(self)

    def submit(self, *arguments: Any) -> Future[Any]:
        """What the verifier returns for these arguments (plain data); its result raises OverLimit,
        or VerifierError."""
        with self._lock:
            if self._crew is None:
                self._crew = Crew(self.verifier, self.time_s, self.memory_mib, self._count)
                atexit.register(self.close)
            return self._crew.submit(list(arguments))

    def close(self) -> None:
        """End the processes, whatever they do, and cancel what waits for them; a later `submit`
        starts new ones."""
        atexit.unregister(self.close)
        with self._lock:
            crew, self._crew = self._crew, None
        if crew is not None:
            crew.close()

    def forget(self) -> None:
        """In a process that was forked: threads are not forked, and the processes are another's."""
        self._crew: Crew | None = None
        self._lock = threading.Lock()


_all: weakref.WeakSet[Verifiers] = weakref.WeakSet()


@functools.cache
def shared_verifiers(verifier: str, time_s: float) -> Verifiers:
    """The ones of this process with this limit."""
    return Verifiers(verifier, time_s=time_s)


def close_verifiers() -> None:
    """Close all of this process."""
    for verifiers in list(_all):
        verifiers.close()


def _forget_all() -> None:
    for verifiers in list(_all):
        verifiers.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


@dataclass
class Job:
    future: Future[Any]
    raw: bytes  # its arguments
    is_second: bool = False  # the process of the first trial died

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Crew:
    """The threads and processes of one Verifiers, from a first job to `close`."""

    def __init__(self, verifier: str, time_s: float, memory_mib: int, count: int) -> None:
        self._verifier, self._time_s, self._memory_mib = verifier, time_s, memory_mib
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closed = False
        self._source: Source | None = None
        self._workers: set[Worker] = set()
        self._starting = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, name=f"{verifier}-verifier", daemon=True)
            for _ in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, arguments: list[Any]) -> Future[Any]:
        job = Job(Future(), json.dumps(arguments).encode())
        if len(job.raw) > MAX_JOB_BYTES:
            job.fail(OverLimit("length"))
        else:
            self._jobs.put(job)
        return job.future

    def close(self) -> None:
        self._closed = True
        self._drop_waiting()
        for _ in self._threads:
            self._jobs.put(None)
        for worker in list(self._workers):
            worker.kill()
        if self._source is not None:
            self._source.close()
        for thread in self._threads:
            thread.join(END_LIMIT_S)
        self._drop_waiting()

    def _drop_waiting(self) -> None:
        with suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None and not job.future.cancel():
                    job.fail(NoProcess(CLOSED))

    def _work(self) -> None:
        worker = None
        while jobs := self._take():
            try:
                worker = worker or self._start_worker()
                worker.send([job.raw for job in jobs], self._time_s)
                while jobs:
                    try:
                        jobs[0].future.set_result(worker.receive(self._time_s))
                    except VerifierError as error:
                        jobs[0].fail(error)
                    jobs.pop(0)
                continue
            except OverLimit as error:
                jobs.pop(0).fail(error)
            except Died as error:
                if jobs[0].is_second or self._closed:
                    jobs.pop(0).fail(OverLimit(error.what))
                else:
                    jobs[0].is_second = True
            except BaseException as error:
                for job in jobs:
                    job.fail(error)
                jobs = []
            worker = self._end(worker)
            for job in jobs:  # for whoever is free
                self._jobs.put(job)
        self._end(worker)

    def _take(self) -> list[Job]:
        """This thread's share of what waits; none at the end."""
        jobs: list[Job] = []
        size, share = 0, 1
        while not jobs or (len(jobs) < share and size < MAX_SENT_BYTES):
            try:
                job = self._jobs.get(block=not jobs)
            except queue.Empty:
                break
            if job is None:
                self._jobs.put(None)  # for after these jobs, or for another thread
                break
            if job.future.running() or job.future.set_running_or_notify_cancel():
                jobs.append(job)
                size += len(job.raw)
                share = min(MAX_SENT, 1 + self._jobs.qsize() // len(self._threads))
        return jobs

    def _start_worker(self) -> Worker:
        with self._starting:
            if self._source is None:
                self._source = self._start_source()
            try:
                worker = self._source.fork(self._memory_mib)
            except NoProcess:
                if self._closed or not self._source.has_started:
                    raise
                self._source.close()  # someone has killed it
                self._source = self._start_source()
                worker = self._source.fork(self._memory_mib)
            self._workers.add(worker)
        if self._closed:
            worker.kill()
        return worker

    def _start_source(self) -> Source:
        if self._closed:
            raise NoProcess(CLOSED)
        source = Source(self._verifier)
        if self._closed:
            source.close()
        return source

    def _end(self, worker: Worker | None) -> None:
        if worker is not None:
            worker.close()
            self._workers.discard(worker)


def _default_count() -> int:
    """A core each, of those that the ranks of this machine share."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    allowed = getattr(os, "sched_getaffinity", None)  # Linux
    cores = len(allowed(0)) if allowed is not None else os.cpu_count() or 1
    return min(MAX_WORKERS, max(1, cores // ranks))
