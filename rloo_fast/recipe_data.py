"""dataset_map: any dataset's rows -> rows with a `prompt`; the recipes' functions by name.

A row function takes a row (a dict of its columns) and returns the row to train on, with no column
but those it wants, or None to leave the row out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RowFunction = Callable[[Row], Row | None]

FIRST_WORDS = 5


def first_five_words(row: Row) -> Row | None:
    """imdb: the beginning of a review, to be continued; shorter reviews are left out."""
    words = row["text"].split()
    return {"prompt": " ".join(words[:FIRST_WORDS])} if len(words) >= FIRST_WORDS else None


def mbpp_chat(row: Row) -> Row:
    """mbpp: the task and its tests as one message; test_list and test_setup_code for the reward."""
    tests = "\n".join(row["test_list"])
    content = (
        f"{row['text'].strip()}\nThe code must pass these tests:\n{tests}\n"
        "Answer with one block of Python code."
    )
    return {
        "prompt": [{"role": "user", "content": content}],
        "test_list": row["test_list"],
        "test_setup_code": row.get("test_setup_code") or "",
    }


ROW_FUNCTIONS: dict[str, RowFunction] = {
    function.__name__: function for function in (first_five_words, mbpp_chat)
}


def load_row_function(name: str) -> RowFunction:
    """A name of ROW_FUNCTIONS, "module:function" or "file.py:function". Raises ValueError."""
    if name in ROW_FUNCTIONS:
        return ROW_FUNCTIONS[name]
    source, _, member = name.rpartition(":")
    if not source:
        raise ValueError(
            f"dataset_map={name!r}: expected one of {', '.join(ROW_FUNCTIONS)}, module:function or "
            "file.py:function."
        )
    try:
        function: RowFunction | None = getattr(_module(source), member, None)
    except Exception as error:  # what its code raises
        raise ValueError(f"dataset_map={name!r}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"dataset_map={name!r}: there is no function {member!r} in {source}.")
    return function


def _module(source: str) -> Any:
    if not source.endswith(".py"):
        return importlib.import_module(source)
    from .rewards.files import run_file

    path = Path(source).expanduser().resolve()
    return run_file(f"rloo_fast_rows_{path.stem}_{abs(hash(path))}", path)


def map_rows(rows: Any, function: RowFunction, name: str) -> Any:
    """What `function` makes of the rows of dataset `name`, a stream as it is read.

    Raises ValueError, with the row, for a function that fails, and if it leaves no row.
    """
    from datasets import Dataset, IterableDataset

    if isinstance(rows, IterableDataset):
        columns = rows.column_names or [*next(iter(rows), {})]
        kept = rows.filter(lambda row: function(row) is not None)
        return kept.map(function, remove_columns=columns)
    made = []
    for number, row in enumerate(rows):
        try:
            new = function(row)
        except Exception as error:  # the user's code
            raise ValueError(
                f"dataset {name!r}, row {number} (counted from 0): dataset_map fails with "
                f"{type(error).__name__}: {error}; the row has {sorted(row)}."
            ) from error
        if new is not None:
            made.append(new)
    if not made:
        raise ValueError(f"dataset {name!r}: dataset_map left none of its {len(rows)} rows.")
    return Dataset.from_list(made)
