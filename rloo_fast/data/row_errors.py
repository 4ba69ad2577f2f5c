"""Rows that cannot be used: the errors, and reading that hands an error on in place of a row.

What a dataset raises while it is read leaves a DataLoader outside the training step, where nothing
can be saved. So it travels as a row, and is raised in the step that would have used it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .row_functions import Row


class UnusableRow(ValueError):
    """A dataset row that cannot be sampled from; the message says why and shows the prompt."""


class UnreadableRow(UnusableRow):
    """The dataset raised in place of a row. Survives a worker process, without its cause there."""

    @classmethod
    def of(cls, error: Exception) -> UnreadableRow:
        unreadable = cls(f"the dataset failed to give a row ({type(error).__name__}: {error}).")
        unreadable.__cause__ = error
        return unreadable


def read(dataset: Any) -> Iterator[Row | UnreadableRow]:
    """The rows of a stream; what it raises comes last, as a row."""
    try:
        yield from dataset
    except Exception as error:  # the user's code, or the network
        yield UnreadableRow.of(error)


class ReadRows:
    """A map-style dataset whose failures come as rows."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, numbers: Sequence[int]) -> list[Row | UnreadableRow]:
        """The rows of a batch; all are read again one by one if one of them fails."""
        try:
            return self.dataset.__getitems__(list(numbers))
        except Exception:
            return [self._one(number) for number in numbers]

    def _one(self, number: int) -> Row | UnreadableRow:
        try:
            return self.dataset[number]
        except Exception as error:  # a transform of the user's
            return UnreadableRow.of(error)
