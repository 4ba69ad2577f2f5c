"""One generation batch as rewards see it: what functions are given, and what they gave.

B rows, F reward functions and models; a function is meant by its number, 0 .. F - 1.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rloo_fast.rewards.builtin import describe_sample
from rloo_fast.rewards.calls import Log

logger = logging.getLogger(__name__)

Decode = Callable[[list[int], list[list[int]]], list[Any]]  # rows, their ids -> completions


class Batch:
    """B rows, of which `completion_ids` come later; completions are decoded when asked for."""

    def __init__(
        self,
        prompts: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
        decode: Decode,
        num_functions: int,
    ) -> None:
        self.prompts, self.columns = prompts, columns
        self.completion_ids: list[Any] = [None] * len(prompts)  # None: not finished
        self.rewards = torch.full((len(prompts), num_functions), math.nan)
        self._completions: list[Any] = [None] * len(prompts)
        self._decode, self._lock = decode, threading.Lock()
        self._logs: list[list[tuple[list[int], Log]]] = [[] for _ in range(num_functions)]

    def completions(self, rows: Sequence[int]) -> list[Any]:
        with self._lock:
            new = [row for row in rows if self._completions[row] is None]
            if new:
                decoded = self._decode(new, [self.completion_ids[row] for row in new])
                for row, completion in zip(new, decoded, strict=True):
                    self._completions[row] = completion
        return [self._completions[row] for row in rows]

    def keywords(self, rows: Sequence[int]) -> dict[str, Any]:
        """Those of a call on these rows, but for trainer_state and the two logs."""
        return {
            "prompts": [self.prompts[row] for row in rows],
            "completions": self.completions(rows),
            "completion_ids": [self.completion_ids[row] for row in rows],
            **{name: [column[row] for row in rows] for name, column in self.columns.items()},
        }

    def put(self, function: int, rows: list[int], values: Tensor, log: Log) -> None:
        """What a call on these rows gave."""
        self.rewards[rows, function] = values
        self._logs[function].append((rows, log))

    def replay(
        self, log_extra: Callable[[str, list], None], log_metric: Callable[[str, float], None]
    ) -> None:
        """What the functions logged, function after function, whatever calls it came from.

        Values for log_extra are in the order of the rows if every call gave one for each of its.
        log_metric gets one value per name and function: the mean of each call's, weighted by its
        number of rows, so that a share of a call's rows becomes the share of all.
        """
        for calls in self._logs:
            calls.sort(key=lambda call: call[0])
            for name in dict.fromkeys(name for _, log in calls for name in log.extra):
                log_extra(name, _in_order([(rows, log.extra.get(name, [])) for rows, log in calls]))
            for name in dict.fromkeys(name for _, log in calls for name, _ in log.metrics):
                log_metric(name, _mean([(len(rows), log.metrics) for rows, log in calls], name))

    def warn_if_unscored(self) -> None:
        unscored = self.rewards.isnan().all(dim=1).nonzero().flatten().tolist()
        if unscored:
            count = len(self.prompts)
            logger.warning(
                "Every reward function returned None for %d of %d completions, which therefore do "
                "not count. The first: %s.",
                len(unscored),
                count,
                describe_sample(unscored[0], self.prompts, self.completions(range(count))),
            )


def _mean(calls: list[tuple[int, list[tuple[str, float]]]], name: str) -> float:
    """(rows of a call, what it logged) -> mean of `name`, every row counting once."""
    total, num_rows = 0.0, 0
    for rows, metrics in calls:
        values = [value for logged, value in metrics if logged == name]
        if values:
            total += rows * sum(values) / len(values)
            num_rows += rows
    return total / num_rows


def _in_order(pieces: list[tuple[list[int], list[Any]]]) -> list[Any]:
    if any(len(rows) != len(values) for rows, values in pieces):
        return [value for _, values in pieces for value in values]
    by_row = {
        row: value for rows, values in pieces for row, value in zip(rows, values, strict=True)
    }
    return [by_row[row] for row in sorted(by_row)]
