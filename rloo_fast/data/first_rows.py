"""What a dataset's rows are, seen by looking at them: `column_names` are those of its storage.

`set_transform` and `with_transform` make the columns when a row is read, and a stream from a
generator knows none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from .row_functions import Row


def is_transformed(dataset: Any) -> bool:
    """Whether the rows are made when they are read, of columns that may have other names."""
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def first_row(dataset: Any) -> Row | None:
    """None: the dataset is empty."""
    row: Any = next(iter(dataset), None)
    return row


def columns_of(dataset: Any, name: str, *, look: bool = True) -> list[str] | None:
    """The columns that a row has; read from its first row only where the dataset does not know.

    Without `look` (the first row may be one that is skipped) None there. Raises ValueError for a
    dataset that is empty, or whose first row is not a dict.
    """
    names = dataset.column_names
    if names is not None and not is_transformed(dataset):
        return list(names)
    if not look:
        return None
    row = first_row(dataset)
    if row is None:
        raise ValueError(f"{name} is empty: it ended without a single row.")
    if not isinstance(row, dict):
        raise ValueError(
            f"{name} gives {type(row).__name__} for a row, where a dict of its columns is needed."
        )
    return list(row)


def only_columns(dataset: Dataset, columns: Sequence[str]) -> Dataset:
    """The dataset, of whose other columns nothing is read where that can be."""
    if is_transformed(dataset):
        return dataset
    wanted = [name for name in columns if name in dataset.column_names]
    return dataset.select_columns(wanted or dataset.column_names[:1])


def rows_of(dataset: Dataset, start: int, stop: int, columns: Sequence[str]) -> list[Row]:
    """These rows, of these columns where the others need not be read."""
    batch: Any = only_columns(dataset, columns)[start:stop]
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
