"""Where each group is, from the moment it is asked for until its step takes it.

A batch b is trained by the weights of version V + steps_until(b - now), where V are the policy's
weights and `now` is the batch that is collected or trained; steps_until(i) = i where each batch is
that of a step. With the engine at version E, a group of b may start as soon as

    E >= V + steps_until(b - now) - max_staleness

and then every token of it is at most `max_staleness` optimizer steps old when it is trained: later
tokens may come from newer weights, never from older ones. Groups start in the order in which they
were asked for, all completions of one together, and are taken in that order: long completions are
not left behind.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...records import Prompt, Trajectory


class Held(NamedTuple):
    """The environment that a trajectory acted in, until it is scored; in memory alone."""

    prompt: Prompt  # with what the environment's `reset` said
    environment: Any
    close: Callable[..., None]  # gives it to the next trajectory; reuse=False: to none


class Sampled(NamedTuple):
    """One completion as an engine sampled it, or a trajectory of several, see `Rollout`."""

    ids: list[int]
    finish_reason: str  # as Rollout's
    logps: list[float] | None
    versions: list[int]  # of the weights that sampled each token, never falling
    trajectory: Trajectory | None = None
    held: Held | None = None  # of a run with environments


class Group(NamedTuple):
    """The K completions of one prompt that a batch asks for."""

    batch: int
    place: int  # of the prompt in the batch
    prompt: Prompt
    seeds: list[int]  # one per completion


class Row(NamedTuple):
    """One completion that an engine is to sample."""

    group: Group
    sample: int


OnSampled = Callable[[Row, Sampled], None]


@dataclass(eq=False)
class _Entry:
    """A group that was asked for and not taken yet."""

    group: Group
    on_sampled: OnSampled
    found: list[Sampled | None]

    @property
    def num_missing(self) -> int:
        return self.found.count(None)


class Flight:
    """A queue of groups with back-pressure, shared by the trainer's thread and an engine's.

    `max_inflight`: most completions that are sampled at a time. `queue_maxsize`: most completions
    that are in flight or wait for their step; a group starts only if it has room. Nothing leaves
    but by `take`: what a step finds too old it has sampled again (`sample_again`).
    """

    def __init__(self, *, max_staleness: int, max_inflight: int, queue_maxsize: int):
        self.max_staleness, self.max_inflight = max_staleness, max_inflight
        self.queue_maxsize = queue_maxsize
        self.num_sampled_again = 0  # completions that were over age
        self._changed = threading.Condition()
        self._entries: dict[tuple[int, int], _Entry] = {}  # by batch and place, as asked for
        self._waiting: deque[_Entry] = deque()  # not started
        self._ready: deque[Row] = deque()  # of started groups, for the next thread
        self._in_flight = 0  # rows of started groups that are not finished
        self._queued = 0  # rows that are finished and not taken
        self._now, self._policy, self._engine = 0, 0, 0  # batch, weights, the engine's weights
        self._steps_until: Callable[[int], int] = lambda i: i
        self._error: BaseException | None = None
        self._closed = False

    # The trainer's thread

    def advance(
        self, now: int, policy: int, engine: int, steps_until: Callable[[int], int] = lambda i: i
    ) -> None:
        """Batch `now` comes next, the policy's weights are `policy`, the engine's `engine`."""
        with self._changed:
            self._now, self._policy, self._engine = now, policy, engine
            self._steps_until = steps_until
            self._changed.notify_all()

    def submit(
        self,
        groups: Sequence[Group],
        on_sampled: OnSampled,
        found: Sequence[Sequence[Sampled | None]] | None = None,
    ) -> None:
        """Ask for groups, which start once they may. `on_sampled` is called for each completion, in
        the thread that brings it. `found`: completions that are there already.
        """
        known = found or [[None] * len(group.seeds) for group in groups]
        entries = [
            _Entry(group, on_sampled, list(rows)) for group, rows in zip(groups, known, strict=True)
        ]
        for entry in entries:
            for sample, sampled in enumerate(entry.found):
                if sampled is not None:
                    on_sampled(Row(entry.group, sample), sampled)
        with self._changed:
            for entry in entries:
                self._entries[entry.group.batch, entry.group.place] = entry
                self._queued += len(entry.found) - entry.num_missing
                if entry.num_missing:
                    self._waiting.append(entry)
            self._changed.notify_all()

    def wait(self, batch: int) -> list[list[Sampled]]:
        """The completions of every group of `batch`, once all are there; raises what an engine's
        thread raised."""
        with self._changed:
            while True:
                if self._error is not None:
                    raise self._error
                entries = self._of(batch)
                assert entries, batch
                if not any(entry.num_missing for entry in entries):
                    return [[row for row in e.found if row is not None] for e in entries]
                self._changed.wait()

    def take(self, batch: int) -> None:
        """The groups of `batch` leave the queue."""
        with self._changed:
            for entry in self._of(batch):
                self._queued -= len(entry.found) - entry.num_missing
                del self._entries[entry.group.batch, entry.group.place]
            self._changed.notify_all()

    def sample_again(self, rows: Sequence[Row], on_sampled: OnSampled) -> None:
        """These completions are over age: drop them, and sample them anew, counted."""
        with self._changed:
            for row in rows:
                entry = self._entries[row.group.batch, row.group.place]
                assert entry.found[row.sample] is not None, row
                entry.found[row.sample], entry.on_sampled = None, on_sampled
                self._queued -= 1
                self._in_flight += 1
                self._ready.append(row)
            self.num_sampled_again += len(rows)
            self._changed.notify_all()

    def known(self) -> list[tuple[Group, list[Sampled | None]]]:
        """Every group that was asked for and not taken, with the completions that are there."""
        with self._changed:
            return [(entry.group, list(entry.found)) for entry in self._entries.values()]

    def counts(self) -> dict[str, int]:
        """Completions: those that wait to be started, are in flight, wait for their step."""
        with self._changed:
            waiting = sum(entry.num_missing for entry in self._waiting)
            return {"waiting": waiting, "in_flight": self._in_flight, "queued": self._queued}

    def close(self) -> None:
        """The threads get nothing more; what they still find is dropped with the queue."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # An engine's threads

    @property
    def is_closed(self) -> bool:
        return self._closed

    def next_row(self) -> Row | None:
        """The next completion to sample; waits for one. None: the flight is closed."""
        rows = self._next(1)
        return rows[0] if rows else None

    def next_rows(self) -> list[Row]:
        """All completions that may be sampled now, at least one; none: the flight is closed."""
        return self._next(self.max_inflight)

    def put(self, row: Row, sampled: Sampled) -> None:
        """A completion is there. Once the flight is closed nobody wants it."""
        with self._changed:
            entry = self._entries.get((row.group.batch, row.group.place))
            wanted = entry is not None and not self._closed
        if entry is None or not wanted:
            if sampled.held is not None:
                sampled.held.close()
            return
        entry.on_sampled(row, sampled)  # before the trainer can see it
        with self._changed:
            entry.found[row.sample] = sampled
            self._in_flight -= 1
            self._queued += 1
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """An engine cannot go on: the trainer's thread gets the error."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _next(self, most: int) -> list[Row]:
        with self._changed:
            while not self._closed:
                while self._waiting and self._may_start(self._waiting[0]):
                    self._start(self._waiting.popleft())
                if self._ready:
                    count = min(most, len(self._ready))
                    return [self._ready.popleft() for _ in range(count)]
                self._changed.wait()
            return []

    def _may_start(self, entry: _Entry) -> bool:
        trained_by = self._policy + self._steps_until(entry.group.batch - self._now)
        rows, held = entry.num_missing, self._in_flight + self._queued
        # the trainer takes nothing before this batch, and a checkpoint may bring more than fits
        is_awaited = entry.group.batch == self._now
        return (
            self._engine >= trained_by - self.max_staleness
            and self._in_flight + rows <= self.max_inflight
            and (is_awaited or held + rows <= self.queue_maxsize)
        )

    def _start(self, entry: _Entry) -> None:
        missing = [Row(entry.group, i) for i, found in enumerate(entry.found) if found is None]
        self._ready.extend(missing)
        self._in_flight += len(missing)

    def _of(self, batch: int) -> list[_Entry]:
        found = [entry for (number, _), entry in self._entries.items() if number == batch]
        return sorted(found, key=lambda entry: entry.group.place)
