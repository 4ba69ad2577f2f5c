"""Threads that calls can be given up in: Python cannot stop one, so it is left behind."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from ..rewards.calls import daemon


class Job:
    """What a thread is to do, or `drop()` where none has begun it; `given_up`: nobody waits for it
    any more."""

    def __init__(self, run: Callable[[Job], None], drop: Callable[[], None]):
        self.run, self.drop = run, drop
        self.given_up = self.done = False


class Threads:
    """Daemon threads for jobs: at most `most` at a time, beside those whose job was given up.

    They start when there is work, and stay for more.
    """

    def __init__(self, most: int, name: str):
        self.most, self.name = most, name
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._alive = self._idle = self._hung = 0
        self._closed = False

    @property
    def num_hung(self) -> int:
        """Threads that still run a job that was given up."""
        return self._hung

    def submit(self, run: Callable[[Job], None], drop: Callable[[], None]) -> Job:
        """`run(job)`, which raises nothing, in the next thread that is free; `drop()` where `close`
        comes first."""
        job = Job(run, drop)
        with self._changed:
            self._closed = False
            self._waiting.append(job)
            self._give_out()
        return job

    def give_up(self, job: Job) -> None:
        """Let its thread go, whatever it does; another takes its place."""
        with self._changed:
            if job.done or job.given_up:
                return
            job.given_up = True
            self._hung += 1
            self._give_out()

    def close(self) -> None:
        """End the threads once their jobs are done. A later `submit` starts new ones."""
        with self._changed:
            self._closed = True
            dropped, self._waiting = self._waiting, deque()
            self._changed.notify_all()
        for job in dropped:
            job.drop()

    def _give_out(self) -> None:
        if self._idle >= len(self._waiting):
            self._changed.notify_all()
        elif self._alive - self._hung < self.most:
            self._alive += 1
            daemon(self._work, self.name)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            job.run(job)
            with self._changed:
                job.done = True
                self._hung -= job.given_up
        with self._changed:
            self._alive -= 1

    def _next(self) -> Job | None:
        """None: the thread is to end, as its place was taken or there is no more work."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._idle += 1
                self._changed.wait()
                self._idle -= 1
            if self._alive - self._hung > self.most or not self._waiting:
                return None
            return self._waiting.popleft()
