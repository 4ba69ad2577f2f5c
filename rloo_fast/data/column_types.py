"""What the columns of rows are made of, and the feature that gives every value back as it was.

A kind is None (nothing seen), a name of Arrow's types, ("list", kind of its items), ("dict", {key:
kind}), or JSON: values of several kinds, which Arrow would make one kind of (5 beside 5.5 -> 5.0)
or fill with None (objects with other keys). Those are an ExactJson, and read as they were.
OTHER: not a value of JSON (a date, an array); Arrow's own conversion holds for its column.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..config.json_text import MAX_DEPTH, TOO_DEEP, parse_json

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]

MAX_NESTED = 16  # levels of lists and dicts as Arrow's types; deeper ones are JSON
JSON, OTHER = "json", "other"
NAMES = {bool: "bool", float: "float64", str: "string"}


def kind_of_row(row: Row) -> dict[str, Any]:
    """Column -> kind. Raises ValueError for values nested more than MAX_DEPTH levels deep."""
    return {name: _kind_of(value) for name, value in row.items()}


def _kind_of(value: Any, level: int = 1) -> Any:
    if level > MAX_DEPTH:
        raise ValueError(f"a value cannot be stored: {TOO_DEEP}.")
    if value is None:
        return None
    if isinstance(value, list):
        kind = None
        for item in value:
            kind = merge(kind, _kind_of(item, level + 1))
        return _bounded(("list", kind), level)
    if isinstance(value, dict):
        kinds = {name: _kind_of(item, level + 1) for name, item in value.items()}
        return _bounded(("dict", kinds), level) if value else JSON
    if type(value) is int:
        return "int64" if -(2**63) <= value < 2**63 else JSON
    return NAMES.get(type(value), OTHER)


def _bounded(kind: Any, level: int) -> Any:
    if level <= MAX_NESTED:
        return kind
    return OTHER if _has_other(kind) else JSON


def merge(one: Any, other: Any) -> Any:
    """The kind that holds the values of both."""
    if one is None or other is None or one == other:
        return other if one is None else one
    if isinstance(one, tuple) and isinstance(other, tuple) and one[0] == other[0]:
        if one[0] == "list":
            return ("list", merge(one[1], other[1]))
        if one[1].keys() == other[1].keys():
            return ("dict", {key: merge(kind, other[1][key]) for key, kind in one[1].items()})
    return OTHER if _has_other(one) or _has_other(other) else JSON


def _has_other(kind: Any) -> bool:
    if not isinstance(kind, tuple):
        return kind == OTHER
    inner = kind[1].values() if kind[0] == "dict" else [kind[1]]
    return any(map(_has_other, inner))


def dataset_of(rows: Sequence[Row]) -> Dataset:
    """A Dataset that gives the rows back as they are; None where a row lacks a column."""
    from datasets import Dataset, Features

    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(chain(*rows))}
    features: dict[str, Any] = {}
    for name, values in columns.items():
        kind: Any = None
        for value in values:
            kind = merge(kind, _kind_of(value))
        if _has_other(kind):
            features[name] = Dataset.from_dict({name: values}).features[name]
        else:
            features[name] = _feature(kind)
    return Dataset.from_dict(columns, features=Features(features))


def features_of(kinds: Mapping[str, Any]) -> Any:
    """datasets.Features of columns of these kinds."""
    from datasets import Features

    return Features({name: _feature(kind) for name, kind in kinds.items()})


def _feature(kind: Any) -> Any:
    from datasets import List, Value

    from .json_feature import ExactJson

    if isinstance(kind, tuple) and kind[0] == "list":
        return List(_feature(kind[1]))
    if isinstance(kind, tuple):
        return {key: _feature(inner) for key, inner in kind[1].items()}
    return ExactJson() if kind == JSON else Value(kind or "null")


# dataset_types: what a column's text stands for


def _bool(text: Any) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    return words[str(text).strip().lower()]


def _int(value: Any) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise ValueError
    return int(value)


def _json(text: Any) -> Any:
    return parse_json(text) if isinstance(text, str) else text


def _str(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


PARSERS: dict[str, Callable[[Any], Any]] = {
    "int": _int, "float": float, "bool": _bool, "json": _json, "str": _str,
}  # fmt: skip


def check_types(types: Mapping[str, str]) -> None:
    """Raise ValueError for a type that is not in PARSERS."""
    for column, name in types.items():
        if name not in PARSERS:
            raise ValueError(
                f"dataset_types: {column!r} is one of {', '.join(PARSERS)}, got {name!r}."
            )


def parse(row: Row, types: Mapping[str, str], number: int) -> Row:
    """The row with the types asked for; an empty text is None where no str is. ValueError."""
    parsed = dict(row)
    for column, name in types.items():
        if column not in row:
            continue
        value = row[column]
        if value is None or (name != "str" and value == ""):
            parsed[column] = None
            continue
        try:
            parsed[column] = PARSERS[name](value)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"row {number} (counted from 0): the column {column!r} has {value!r:.80}, which is "
                f"no {name} as dataset_types asks for."
            ) from error
    return parsed
