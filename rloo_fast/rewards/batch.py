"""One generation batch in the reward stage: inputs of the functions, their rewards and their logs.

B rows, F reward functions and models, numbered 0 .. F - 1.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..records import Count
from .calls import Log

logger = logging.getLogger(__name__)

Decode = Callable[[list[int], list[list[int]]], list[Any]]  # rows, their ids -> completions


class Batch:
    """B rows whose `completion_ids` arrive later; completions are decoded when they are needed."""

    def __init__(
        self,
        prompts: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
        decode: Decode,
        num_functions: int,
    ) -> None:
        self.prompts = list(prompts)
        self.columns = {name: list(column) for name, column in columns.items()}
        self.completion_ids: list[Any] = [None] * len(prompts)  # None: not finished
        self.rewards = torch.full((len(prompts), num_functions), math.nan, dtype=torch.float32)
        self._completions: list[Any] = [None] * len(prompts)
        self._decode, self._lock = decode, threading.Lock()
        self._logs: list[list[tuple[list[int], Log | None]]] = [[] for _ in range(num_functions)]

    def set_row(self, row: int, prompt: Any, columns: Mapping[str, Any]) -> None:
        """What becomes known of a row only as it is sampled, before it is finished."""
        self.prompts[row] = prompt
        for name, value in columns.items():
            self.columns[name][row] = value

    def completions(self, rows: Sequence[int]) -> list[Any]:
        with self._lock:
            new = [row for row in rows if self._completions[row] is None]
            if new:
                decoded = self._decode(new, [self.completion_ids[row] for row in new])
                for row, completion in zip(new, decoded, strict=True):
                    self._completions[row] = completion
        return [self._completions[row] for row in rows]

    def of(self, rows: Sequence[int]) -> tuple[list[Any], list[Any]]:
        """Their prompts and completions."""
        return [self.prompts[row] for row in rows], self.completions(rows)

    def keywords(self, rows: Sequence[int]) -> dict[str, Any]:
        """Keyword arguments of a call on these rows, but trainer_state and the log functions.

        Rows of one prompt share its objects here: functions are given copies of these.
        """
        prompts, completions = self.of(rows)
        return {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": [self.completion_ids[row] for row in rows],
            **{name: [column[row] for row in rows] for name, column in self.columns.items()},
        }

    def put(self, function: int, rows: list[int], values: Tensor, log: Log) -> None:
        """Store the rewards and the log of a call on these rows."""
        self.rewards[rows, function] = values
        self._logs[function].append((rows, log))

    def put_over_limit(self, function: int, rows: list[int], values: Tensor) -> None:
        """Store the rewards of rows that no call has scored, and so has logged nothing for."""
        self.rewards[rows, function] = values
        self._logs[function].append((rows, None))

    @property
    def num_over_limit(self) -> int:
        """Rows of put_over_limit, of all functions."""
        return sum(len(rows) for calls in self._logs for rows, log in calls if log is None)

    def replay(
        self, log_extra: Callable[[str, list], None], log_metric: Callable[[str, float], None]
    ) -> None:
        """Pass on what the functions logged, as if each had been called once on all rows.

        Values for log_extra are in the order of the rows if every call gave one for each of its.
        log_metric gets one value per name and function: the mean of each call's, weighted by its
        number of rows, so that a share of a call's rows becomes the share of all; a Count's sum.
        """
        for calls in self._logs:
            calls.sort(key=lambda call: call[0])
            logs = [(rows, log) for rows, log in calls if log is not None]
            for name in dict.fromkeys(name for _, log in logs for name in log.extra):
                log_extra(name, _in_order([(rows, _extra(rows, log, name)) for rows, log in calls]))
            for name in dict.fromkeys(name for _, log in logs for name, _ in log.metrics):
                log_metric(name, _over_calls([(len(r), log.metrics) for r, log in logs], name))

    def warn_if_unscored(self) -> None:
        unscored = self.rewards.isnan().all(dim=1).nonzero().flatten().tolist()
        if unscored:
            first = unscored[0]
            given = {name: column[first] for name, column in self.columns.items()}
            given |= {"prompt": self.prompts[first], "completion": self.completions([first])[0]}
            logger.warning(
                "All reward functions returned None for the following kwargs:\n%s\n"
                "So they did for %d of %d completions, which therefore do not count. Please ensure "
                "that at least one reward function returns a valid reward.",
                given,
                len(unscored),
                len(self.prompts),
            )


def _extra(rows: list[int], log: Log | None, name: str) -> list[Any]:
    return [None] * len(rows) if log is None else log.extra.get(name, [])


def _over_calls(calls: list[tuple[int, list[tuple[str, float]]]], name: str) -> float:
    """(rows of a call, what it logged) -> mean of `name`, every row counting once.

    A Count's sum.
    """
    total, num_rows = 0.0, 0
    count: Count | None = None
    for rows, metrics in calls:
        values = [value for logged, value in metrics if logged == name]
        if counts := [value for value in values if isinstance(value, Count)]:
            count = Count((count or 0) + sum(counts))
        elif values:
            total += rows * sum(values) / len(values)
            num_rows += rows
    return total / num_rows if count is None else count


def _in_order(pieces: list[tuple[list[int], list[Any]]]) -> list[Any]:
    if any(len(rows) != len(values) for rows, values in pieces):
        return [value for _, values in pieces for value in values]
    by_row = {
        row: value for rows, values in pieces for row, value in zip(rows, values, strict=True)
    }
    return [by_row[row] for row in sorted(by_row)]
