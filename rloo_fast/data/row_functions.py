"""dataset_map: any dataset's rows -> rows with a `prompt`; the recipes' functions by name.

A row function takes a row (a dict of its columns) and returns the row to train on, with no column
but those it wants, or None to leave the row out.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

from ..config.code_files import run_file
from ..config.paths import user_path
from .column_types import Row, dataset_of

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


def clevr_count(row: Row) -> Row | None:
    """clevr_cogen_a_train: an image, how many things of a kind are in it, and the number."""
    found = re.search(r"<answer>\s*(\d+)\s*</answer>", row["solution"])
    if found is None:
        return None
    content = f"{row['problem'].strip()} Answer with the number alone."
    return {
        "prompt": [{"role": "user", "content": content}],
        "image": row["image"],
        "answer": found.group(1),
    }


ROW_FUNCTIONS: dict[str, RowFunction] = {
    function.__name__: function for function in (first_five_words, mbpp_chat, clevr_count)
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
    path = user_path(source).resolve()
    return run_file(f"rloo_fast_rows_{path.stem}_{abs(hash(path))}", path)


def map_rows(rows: Any, function: RowFunction, name: str) -> Any:
    """What `function` makes of the rows of dataset `name`; a stream is mapped as it is read.

    Columns are those of all new rows, None where a row lacks one; a stream's rows keep their own.
    Images are as they are stored ({"bytes", "path"}), so that not all of them are held as pixels.
    Raises ValueError, with the row, for a function that fails or returns neither dict nor None;
    and, where the rows are no stream, if none is left.
    """
    from datasets import Image, IterableDataset

    for column, kind in (rows.features or {}).items():
        if isinstance(kind, Image):
            rows = rows.cast_column(column, Image(decode=False))
    if isinstance(rows, IterableDataset):
        columns = rows.column_names or [*next(iter(rows), {})]

        def of_one(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
            """Batches of one row: unlike a map by rows, it may leave the row out."""
            row = {column: values[0] for column, values in batch.items()}
            new = _new_row(row, numbers[0], function, name)
            return {} if new is None else {column: [value] for column, value in new.items()}

        options: dict[str, Any] = {"batched": True, "batch_size": 1, "with_indices": True}
        return rows.map(of_one, remove_columns=columns, **options)
    made = [_new_row(row, number, function, name) for number, row in enumerate(rows)]
    kept = [row for row in made if row is not None]
    if not kept:
        raise ValueError(f"dataset {name!r}: dataset_map left none of its {len(rows)} rows.")
    return dataset_of(kept)


def _new_row(row: Row, number: int, function: RowFunction, name: str) -> Row | None:
    where = f"dataset {name!r}, row {number} (counted from 0): dataset_map"
    try:
        new = function(row)
    except Exception as error:  # the user's code
        raise ValueError(
            f"{where} fails with {type(error).__name__}: {error}; the row has {sorted(row)}."
        ) from error
    if new is not None and not isinstance(new, dict):
        raise ValueError(
            f"{where} returns the new row as a dict, or None to leave it out; got "
            f"{type(new).__name__}."
        )
    return new
