"""Text files of rows (.csv, .tsv, .jsonl, .ndjson, .json, also .gz, .bz2, .xz) -> rows whose values
are as written.

Nothing is guessed: a cell of a CSV file is text, "007" and "None" too. A JSON value is what JSON
says it is: a string that looks like a date stays one, and 5 beside 5.5 stays 5. `types` asks for
more, by column.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..config.json_text import HALF, is_text, parse_json
from .column_types import features_of, kind_of_row, merge, parse
from .row_functions import Row

SEPARATORS = {".csv": ",", ".tsv": "\t"}
KINDS = (*SEPARATORS, ".jsonl", ".ndjson", ".json")
COMPRESSED: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open,
}  # fmt: skip
NUM_LOOKED_AT = 1000  # rows of a stream whose columns are those of all its rows
# bounds on what is held at once: a small compressed file may hold much
MAX_LINE = 2**28  # bytes, or characters of a CSV file
MAX_WHOLE = 2**31  # bytes of a file that is one JSON value


def kind_of(path: Path) -> str | None:
    """The suffix that says how the rows are written, None: this is no text file of rows."""
    suffix = Path(path.stem).suffix if path.suffix.lower() in COMPRESSED else path.suffix
    return suffix.lower() if suffix.lower() in KINDS else None


def load_text_files(
    paths: Sequence[Path], types: Mapping[str, str], *, streaming: bool
) -> Any:  # Dataset or IterableDataset
    """All rows of the files. A column that a row lacks is None.

    Raises ValueError, with file and line, for what cannot be read, and for files without a row.
    """
    from datasets import Dataset, IterableDataset

    options: dict[str, Any] = {"paths": tuple(map(str, paths)), "types": dict(types)}
    looked_at = islice(read_rows(**options), NUM_LOOKED_AT if streaming else None)
    kinds: dict[str, Any] = {}
    for row in looked_at:
        kinds = merge_rows(kinds, row)
    if not kinds:
        raise ValueError(
            f"dataset {str(paths[0])!r} is empty: it needs at least one row with a prompt."
        )
    if unknown := sorted({*types} - {*kinds}):
        raise ValueError(
            f"dataset {str(paths[0])!r}: dataset_types names {', '.join(map(repr, unknown))}, but "
            f"the columns are {sorted(kinds)}."
        )
    if streaming:
        return IterableDataset.from_generator(
            whole_rows, gen_kwargs=options | {"columns": tuple(kinds)}
        )
    # datasets keeps what it made of the same arguments: an edited file has other stamps
    stamps = [(path.stat().st_mtime_ns, path.stat().st_size) for path in paths]
    return Dataset.from_generator(
        stamped_rows,
        gen_kwargs=options | {"kinds": kinds, "stamps": tuple(stamps)},
        features=features_of(kinds),
    )


def merge_rows(kinds: dict[str, Any], row: Row) -> dict[str, Any]:
    """Column -> kind of the rows so far and this one."""
    new = kind_of_row(row)
    return {name: merge(kinds.get(name), new.get(name)) for name in dict.fromkeys((*kinds, *new))}


def whole_rows(
    paths: Sequence[str], types: Mapping[str, str], columns: Sequence[str]
) -> Iterator[Row]:
    """The rows with all of `columns`."""
    nothing = dict.fromkeys(columns)
    for row in read_rows(paths, types):
        yield nothing | row


def stamped_rows(
    paths: Sequence[str], types: Mapping[str, str], kinds: Mapping[str, Any], stamps: Any
) -> Iterator[Row]:
    """The rows with all columns of `kinds`; `stamps` tell an edited file from the one before."""
    return whole_rows(paths, types, tuple(kinds))


def read_rows(paths: Sequence[str], types: Mapping[str, str]) -> Iterator[Row]:
    """The rows of all files, with the `types` asked for."""
    for name in paths:
        path = Path(name)
        read = _csv_rows if kind_of(path) in SEPARATORS else _json_rows
        try:
            for number, row in enumerate(read(path)):
                yield parse(row, types, number)
        except (ValueError, EOFError, OSError, lzma.LZMAError) as error:
            where = ", " if str(error).startswith(("line", "row")) else ": "
            raise ValueError(f"dataset {name!r}{where}{error}") from error


def _open(path: Path) -> Any:
    return COMPRESSED.get(path.suffix.lower(), open)(path, "rb")


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE)
    with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(_lines(text), delimiter=SEPARATORS[str(kind_of(path))], strict=True)
        try:
            header = next(filter(None, reader), [])
            if twice := sorted({name for name in header if header.count(name) > 1}):
                raise ValueError(f"line {reader.line_num}: the column {twice[0]!r} is there twice.")
            for cells in reader:
                if len(cells) > len(header):
                    raise ValueError(
                        f"line {reader.line_num}: expected {len(header)} fields, saw {len(cells)}."
                    )
                if cells:
                    missing = [None] * (len(header) - len(cells))
                    yield dict(zip(header, [*cells, *missing], strict=True))
        except UnicodeDecodeError as error:
            raise ValueError(f"line {reader.line_num + 1} or later: not UTF-8 text.") from error
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}.") from error


def _json_rows(path: Path) -> Iterator[Row]:
    """One object per line, or an array of them; in a .json file also a single object."""
    with _open(path) as file:
        beginning = file.peek(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        if beginning.startswith(b"[") or kind_of(path) == ".json":
            text = file.read(MAX_WHOLE)
            if len(text) == MAX_WHOLE:
                raise ValueError(
                    f"one JSON value of {MAX_WHOLE >> 20} MiB or more is not read: write a line "
                    "per row, as .jsonl."
                )
            whole = _whole_json(text, may_be_lines=not beginning.startswith(b"["))
            if whole is not None:
                yield from whole
                return
            file = io.BytesIO(text)
        for number, line in enumerate(_lines(file), start=1):
            if line.strip():
                yield _json_line(line.removeprefix(b"\xef\xbb\xbf"), number)


def _lines(file: Any) -> Iterator[Any]:
    """The lines of a text or binary file. Raises ValueError for one of MAX_LINE."""
    number = 1
    while line := file.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise ValueError(f"line {number}: {MAX_LINE >> 20} MiB or more are no row.")
        yield line
        number += 1


def _json_line(line: bytes, number: int) -> Row:
    try:
        row = parse_json(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"line {number}: not UTF-8 text.") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"line {number}: not valid JSON: {error.msg} at column {error.colno}."
        ) from error
    except ValueError as error:
        raise ValueError(f"line {number}: {error}.") from error
    if not _is_storable(row, line):
        raise ValueError(f"line {number}: {HALF}.")
    if not isinstance(row, dict):
        raise ValueError(f'line {number}: expected an object such as {{"prompt": "..."}}.')
    return row


def _is_storable(value: Any, written: bytes) -> bool:
    """Whether all text in a JSON value can be stored: the escapes of one character may be half."""
    return b"\\ud" not in written.lower() or is_text(json.dumps(value, ensure_ascii=False))


def _whole_json(text: bytes, *, may_be_lines: bool) -> list[Row] | None:
    """The rows of a file that is one JSON value; None for one that is lines of them."""
    try:
        value = parse_json(text.decode("utf-8-sig")) if text.strip() else []
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8 text.") from error
    except json.JSONDecodeError as error:
        if may_be_lines and error.msg == "Extra data":
            return None
        raise ValueError(
            f"line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}."
        ) from error
    except ValueError as error:
        raise ValueError(f"{error}.") from error
    if not _is_storable(value, text):
        raise ValueError(f"{HALF}.")
    rows = value if isinstance(value, list) else [value]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError('expected objects such as {"prompt": "..."}.')
    return rows
