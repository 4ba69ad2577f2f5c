"""Rewards of finished groups, computed while other rows are still being sampled."""

from __future__ import annotations

import concurrent.futures
import functools
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from rloo_fast.rewards.batch import Batch
from rloo_fast.rewards.calls import Caller, Log, daemon
from rloo_fast.rewards.models import RewardModel, call_model
from rloo_fast.rewards.processes import Pool, Worker
from rloo_fast.rewards.values import read_values

# An engine that finishes many rows at once reports them one by one: a thread that took the first
# would split them into two calls. So a group waits this long for others, or for the end.
GATHER_S = 0.05


class Busy:
    """Counts the seconds in which at least one thread is inside `with busy:`."""

    def __init__(self) -> None:
        self._lock, self._inside, self._since, self._seconds = threading.Lock(), 0, 0.0, 0.0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._since = time.monotonic()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._seconds += time.monotonic() - self._since

    def seconds(self) -> float:
        with self._lock:
            running = time.monotonic() - self._since if self._inside else 0.0
            return self._seconds + running


class Scoring:
    """The rewards of one batch.

        with rewards.begin(...) as scoring:
            ...  # scoring.finished(row, completion_ids), from one thread
            rewards = scoring.end(completion_ids)

    A group is scored once all its rows are finished. Functions in this process run in one
    background thread, on all groups that wait as one batch, while the next gather; what is left at
    the end, and the models, run in the thread that calls `end`. In worker processes every group is
    a call. An error is raised by the next `finished`, at the latest by `end`; once it leaves the
    `with`, nothing more is called.
    """

    def __init__(
        self,
        functions: Sequence[Any],  # RewardFunction or RewardModel
        batch: Batch,
        groups: Sequence[list[int]],
        trainer_state: Any,
        caller: Caller,
        pool: Pool | None,
    ) -> None:
        self.batch = batch
        self.hidden_s = 0.0  # seconds of reward work before `end`
        self._functions, self._trainer_state = functions, trainer_state
        self._caller, self._pool = caller, pool
        kinds: dict[str, list[int]] = {"model": [], "async": [], "sync": []}
        for i, function in enumerate(functions):
            is_model = isinstance(function, RewardModel)
            kinds["model" if is_model else "async" if function.is_async else "sync"].append(i)
        self._models, self._async = kinds["model"], kinds["async"]
        self._sync = kinds["sync"] if pool is None else []
        self._pooled = [] if pool is None else kinds["sync"]
        self._pickled_state = pickle.dumps(trainer_state) if self._pooled else b""
        self._groups = groups
        self._group_of = {row: number for number, group in enumerate(groups) for row in group}
        self._num_missing = [len(group) for group in groups]
        self._busy = Busy()
        self._in_workers: list[concurrent.futures.Future] = []
        self._in_loop: list[concurrent.futures.Future] = []  # async calls
        # What the background thread and this one share, under `_changed`
        self._changed = threading.Condition()
        self._waiting: list[int] = []  # rows of finished groups
        self._waiting_since = 0.0
        self._thread: threading.Thread | None = None
        self._at_work = self._ended = self._stopped = False
        self._error: BaseException | None = None

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._stop()

    def finished(self, row: int, completion_ids: list[int]) -> None:
        """The row is complete; raises the error of a function that has failed by now."""
        self._raise_error()
        assert self.batch.completion_ids[row] is None, row
        self.batch.completion_ids[row] = completion_ids
        number = self._group_of[row]
        self._num_missing[number] -= 1
        if not self._num_missing[number]:
            self._hand_over(self._groups[number])

    def end(
        self,
        completion_ids: Sequence[list[int]],
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
    ) -> Tensor:
        """-> (B, F), as Rewards.__call__. `completion_ids`: of all rows; those that were not
        reported as finished are now. What was logged is replayed as Batch.replay says."""
        self.hidden_s = self._busy.seconds()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        for row, ids in enumerate(completion_ids):
            if self.batch.completion_ids[row] is None:
                self.finished(row, ids)
            assert self.batch.completion_ids[row] == ids, row
        self._raise_error()
        models = self._models
        if self._at_work:
            self._run([], models)
            models = []
            with self._changed:
                self._changed.wait_for(lambda: not self._at_work or self._error is not None)
        self._raise_error()
        self._run(sorted(self._waiting), models)
        done, _ = concurrent.futures.wait(self._in_workers, return_when="FIRST_EXCEPTION")
        for future in done:
            future.result()
        self.batch.warn_if_unscored()
        self.batch.replay(log_extra or _ignore, log_metric or _ignore)
        return self.batch.rewards

    def _hand_over(self, group: list[int]) -> None:
        for i in self._pooled:
            assert self._pool is not None
            future = self._pool.submit(functools.partial(self._run_in_worker, i, group))
            future.add_done_callback(self._note_error)
            self._in_workers.append(future)
        if not (self._async or self._sync):
            return
        with self._changed:
            if not self._waiting:
                self._waiting_since = time.monotonic()
            self._waiting.extend(group)
            if self._thread is None and not self._ended:
                self._thread = daemon(self._work, "rewards")
            self._changed.notify_all()

    def _work(self) -> None:
        """The background thread."""
        while rows := self._take():
            try:
                with self._busy:
                    self._run(rows)
            except BaseException as error:
                self._set_error(error)
            with self._changed:
                self._at_work = False
                self._changed.notify_all()

    def _take(self) -> list[int]:
        """All rows that wait, once they have waited long enough; none when there is an end."""
        with self._changed:
            while not self._ended and self._error is None:
                left = None
                if self._waiting:
                    left = self._waiting_since + GATHER_S - time.monotonic()
                    if left <= 0:
                        rows, self._waiting = sorted(self._waiting), []
                        self._at_work = True
                        return rows
                self._changed.wait(left)
        return []

    def _run(self, rows: list[int], models: Sequence[int] = ()) -> None:
        """One call of every function of this process on these rows, if any, and of the models on
        all rows. Async functions run at the same time as all others."""
        in_loop, sync = (self._async, self._sync) if rows else ([], [])
        keywords = {**self.batch.keywords(rows), "trainer_state": self._trainer_state}
        logs = {i: Log() for i in (*in_loop, *sync)}
        started = time.monotonic()
        running = {}
        for i in in_loop:
            f = self._functions[i]
            running[f.name] = self._caller.start(f.function, f.name, keywords | logs[i].keywords())
        self._in_loop = list(running.values())
        try:
            for i in (*sorted([*sync, *models]), *in_loop):
                if self._stopped:
                    return
                f = self._functions[i]
                if i in models:
                    self._run_model(i)
                    continue
                if i in in_loop:
                    values = self._caller.wait(f.name, running, started)
                else:
                    values = self._caller.call(f.function, f.name, keywords | logs[i].keywords())
                prompts, completions = keywords["prompts"], keywords["completions"]
                values = read_values(values, f.name, prompts, completions, rows)
                self.batch.put(i, rows, values, logs[i])
        finally:
            for future in self._in_loop:
                future.cancel()  # those that still run, if another has failed

    def _run_model(self, i: int) -> None:
        rows = list(range(len(self.batch.prompts)))
        batch = self.batch
        completions = batch.completions(rows)
        values = call_model(self._functions[i], batch.prompts, completions, batch.completion_ids)
        self.batch.put(i, rows, values, Log())

    def _run_in_worker(self, i: int, rows: list[int], worker: Worker) -> None:
        with self._busy:
            keywords, name = self.batch.keywords(rows), self._functions[i].name
            self.batch.put(i, rows, *worker.call(name, rows, keywords, self._pickled_state))

    # Errors

    def _note_error(self, future: concurrent.futures.Future) -> None:
        if not future.cancelled() and (error := future.exception()) is not None:
            self._set_error(error)

    def _set_error(self, error: BaseException) -> None:
        with self._changed:
            if self._error is None:
                self._error = error
            self._changed.notify_all()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _stop(self) -> None:
        with self._changed:
            self._stopped = self._ended = True
            self._changed.notify_all()
        for future in (*self._in_loop, *self._in_workers):
            future.cancel()
        if self._pool is not None and not all(future.done() for future in self._in_workers):
            self._pool.close()


def _ignore(name: str, value: Any) -> None:
    return
