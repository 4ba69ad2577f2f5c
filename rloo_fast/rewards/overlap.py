"""Rewards of finished groups, computed while other rows are still being sampled."""

from __future__ import annotations

import concurrent.futures
import functools
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..records import Count
from .batch import Batch
from .calls import Caller, Log, RewardError, daemon
from .models import RewardModel, call_model
from .over_limit import Call, OverLimit
from .processes import Pool, Worker
from .values import read_values

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


class InLoop(NamedTuple):
    """A call of an async function, on the event loop since `since`."""

    name: str
    rows: list[int]
    future: concurrent.futures.Future
    log: Log
    since: float


class Scoring:
    """The rewards of one batch.

        with rewards.begin(...) as scoring:
            ...  # scoring.finished(row, completion_ids), from one thread
            rewards = scoring.end(completion_ids, ended)

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
        over_limit: OverLimit,
    ) -> None:
        self.batch = batch
        self.hidden_s = 0.0  # seconds of reward work before `end`
        self._functions, self._trainer_state = functions, trainer_state
        self._caller, self._pool, self._over_limit = caller, pool, over_limit
        self._models: list[int] = []
        self._async: list[int] = []
        self._sync: list[int] = []
        self._pooled: list[int] = []
        for i, function in enumerate(functions):
            if isinstance(function, RewardModel):
                self._models.append(i)
            elif function.is_async:
                self._async.append(i)
            else:
                (self._pooled if pool is not None and function.in_workers else self._sync).append(i)
        self._pickled_state = pickle.dumps(trainer_state) if self._pooled else b""
        self._groups = groups
        self._group_of = {row: number for number, group in enumerate(groups) for row in group}
        self._num_missing = [len(group) for group in groups]
        self._completions_ended: Sequence[bool] | None = None  # known at the end
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

    @property
    def may_be_at_work(self) -> bool:
        """Whether a function may still run on some rows, in a thread of this process."""
        return self._at_work or self._error is not None

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._stop()

    def finished(self, row: int, completion_ids: list[int]) -> None:
        """The row is complete. Raises the error of a function that has failed by now."""
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
        ended: Sequence[bool] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
    ) -> Tensor:
        """-> (B, F), as Rewards.__call__. `completion_ids`: of all rows; those that were not
        reported as finished are now. `ended`: see RewardModel. What was logged is replayed as
        Batch.replay says."""
        self._completions_ended = ended
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
        if log_metric is not None and not self._over_limit.ends_the_run:
            log_metric("over_limit", Count(self.batch.num_over_limit))
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
        started = {i: self._start(i, rows) for i in in_loop}
        self._in_loop = [call.future for call in started.values()]
        try:
            for i in (*sorted([*sync, *models]), *in_loop):
                if self._stopped:
                    return
                if i in models:
                    self._run_model(i)
                elif i in in_loop:
                    self._score(i, rows, lambda some, i=i: self._wait(i, some, started), self._each)
                else:
                    self._score(i, rows, lambda some, i=i: self._call(i, some), _none_alone)
        finally:
            for future in self._in_loop:
                future.cancel()  # those that still run, if another has failed

    def _score(self, i: int, rows: list[int], call: Call, alone: Callable[..., Any]) -> None:
        name = self._functions[i].name
        tried = functools.partial(alone, i)
        self._over_limit.score(self.batch, i, name, rows, call, tried)

    def _keywords(self, rows: list[int], log: Log) -> dict[str, Any]:
        state = {"trainer_state": self._trainer_state}
        return self.batch.keywords(rows) | state | log.keywords()

    def _call(self, i: int, rows: list[int]) -> tuple[Tensor, Log]:
        f, log = self._functions[i], Log()
        values = self._caller.call(f.function, f.name, self._keywords(rows, log))
        return self._read(i, rows, values), log

    def _start(self, i: int, rows: list[int]) -> InLoop:
        f, log = self._functions[i], Log()
        future = self._caller.start(f.function, f.name, self._keywords(rows, log))
        return InLoop(f.name, rows, future, log, time.monotonic())

    def _wait(self, i: int, rows: list[int], started: dict[int, InLoop]) -> tuple[Tensor, Log]:
        """Of the call on these rows; a second one, on fewer of them, is made here."""
        call = started[i]
        if call.rows != rows:
            call = self._start(i, rows)
            self._in_loop.append(call.future)
        running = {other.name: other.future for other in started.values()}
        values = self._caller.wait(call.name, running | {call.name: call.future}, call.since)
        return self._read(i, rows, values), call.log

    def _each(self, i: int, rows: list[int]) -> Iterator[tuple[int, Exception | None]]:
        """The async function on every row by itself, at the same time."""
        calls = {row: self._start(i, [row]) for row in rows}
        self._in_loop += [call.future for call in calls.values()]
        for row in rows:
            yield row, _error_of(lambda row=row: self._wait(i, [row], {i: calls[row]}))

    def _read(self, i: int, rows: list[int], values: Any) -> Tensor:
        prompts, completions = self.batch.of(rows)
        return read_values(values, self._functions[i].name, prompts, completions, rows)

    def _run_model(self, i: int) -> None:
        rows = list(range(len(self.batch.prompts)))
        batch = self.batch
        completions = batch.completions(rows)
        ended = self._completions_ended
        values = call_model(self._functions[i], batch.prompts, completions, ended)
        self.batch.put(i, rows, values, Log())

    def _run_in_worker(self, i: int, rows: list[int], worker: Worker) -> None:
        def call(some: list[int]) -> tuple[Tensor, Log]:
            keywords = self.batch.keywords(some)
            return worker.call(self._functions[i].name, some, keywords, self._pickled_state)

        def each(i: int, some: list[int]) -> Iterator[tuple[int, Exception | None]]:
            for row in some:
                yield row, _error_of(lambda row=row: call([row]))

        with self._busy:
            self._score(i, rows, call, each)

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


def _error_of(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except (RewardError, ValueError) as error:
        return error
    return None


def _none_alone(i: int, rows: list[int]) -> Iterator[tuple[int, Exception | None]]:
    """Nothing is tried while the call that was given up still runs, in a thread of this process."""
    yield from ()


def _ignore(name: str, value: Any) -> None:
    return
