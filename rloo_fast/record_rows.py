"""Records of rows: how a field says along what it runs, and cutting, joining and saving by that.

`records.py` has the records, and the letters.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import Field, field, fields, is_dataclass, replace
from typing import (
    Any,
    ClassVar,
    Protocol,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import torch
from torch import Tensor


def per_row(**kwargs: Any) -> Any:
    """A dataclass field with an entry per row: a list, a tensor (R, ...), or a record of such."""
    return field(metadata={"along": "rows"}, **kwargs)


def per_token(**kwargs: Any) -> Any:
    """A dataclass field with an entry per counted token: a tensor (N,), row after row."""
    return field(metadata={"along": "tokens"}, **kwargs)


def newest(**kwargs: Any) -> Any:
    """A version of the whole batch: of joined batches the newest counts."""
    return field(metadata={"joined": max}, **kwargs)


class DataclassRecord(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


Record = TypeVar("Record", bound=DataclassRecord)


def _along(record: Any) -> list[tuple[Field[Any], Any, str]]:
    """(field, value, "rows" or "tokens") of what runs along rows and is there."""
    found = [(f, getattr(record, f.name), f.metadata.get("along")) for f in fields(record)]
    return [(f, value, along) for f, value, along in found if along and value is not None]


def take_rows(record: Record, rows: Sequence[int]) -> Record:
    """The record of these rows only, in this order."""
    taken: dict[str, Any] = {}
    for f, value, along in _along(record):
        if along == "tokens":
            taken[f.name] = value[cast(Any, record).token_index(rows)]
        elif is_dataclass(value):
            taken[f.name] = take_rows(cast(DataclassRecord, value), rows)
        elif isinstance(value, Tensor):
            taken[f.name] = value[list(rows)]
        else:
            taken[f.name] = [value[row] for row in rows]
    return replace(record, **taken)


def concatenate(parts: Sequence[Record]) -> Record:
    """The rows of all records, one record's after the other's; the rest is the first one's, but for
    versions: the newest."""
    joined: dict[str, Any] = {}
    for f in fields(parts[0]):
        values = [getattr(part, f.name) for part in parts]
        if "joined" in f.metadata and None not in values:
            joined[f.name] = f.metadata["joined"](values)
        if f.metadata.get("along"):
            missing = [value is None for value in values]
            assert all(missing) or not any(missing), f"{f.name}: some batches have none"
    for f, value, _ in _along(parts[0]):
        values = [getattr(part, f.name) for part in parts]
        if is_dataclass(value):
            joined[f.name] = concatenate(values)
        elif isinstance(value, Tensor):
            joined[f.name] = torch.cat(values)
        else:
            joined[f.name] = [row for value in values for row in value]
    return replace(parts[0], **joined)


def as_plain(record: Any) -> Any:
    """A record as dicts, lists, numbers and tensors, which torch.load(weights_only=True) reads."""
    if is_dataclass(record):
        return {f.name: as_plain(getattr(record, f.name)) for f in fields(record)}
    value: Any = record
    return (
        dict(value._asdict()) if isinstance(record, tuple) and hasattr(value, "_asdict") else value
    )


def from_plain(kind: Any, plain: Any) -> Any:
    """The inverse of `as_plain`. Raises TypeError for a field that `kind` does not have."""
    if get_origin(kind) in (types.UnionType, Union):
        kind = next(k for k in get_args(kind) if k is not type(None))
    if plain is None or not isinstance(plain, dict):
        return plain
    entries = cast(dict[str, Any], plain)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        values = {name: from_plain(hints.get(name), value) for name, value in entries.items()}
        return cast(Any, kind)(**values)
    return kind(**entries) if hasattr(kind, "_fields") else entries
