"""metrics.jsonl: one JSON object per log of a run."""

import errno
import itertools
import json
import logging
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config.json_text import parse_json
from ..masking import masked_known

logger = logging.getLogger(__name__)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: a reader or a kill finds the old file or the new, never a part.

    Secrets that the run has met are masked.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(_without_secrets(data))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _without_secrets(data: bytes) -> bytes:
    text = data.decode(errors="surrogateescape")
    return masked_known(text).encode(errors="surrogateescape")


class RunFile:
    """A file of a run that grows by whole records; for the main process only."""

    def __init__(self, path: Path):
        self.path = path
        self._warned = False
        path.parent.mkdir(parents=True, exist_ok=True)

    def put_aside(self) -> None:
        """Keep a former run's file beside, as `<name>.<n>.<suffix>`. OSError if that fails."""
        stem, suffix = self.path.stem, self.path.suffix
        names = (self.path.with_name(f"{stem}.{n}{suffix}") for n in itertools.count(1))
        kept_as = next(name for name in names if not name.exists())
        self.path.rename(kept_as)
        logger.info("%s is a former run's: kept as %s.", self.path, kept_as.name)

    def append(self, record: bytes) -> None:
        """Add the record, whole or not at all, known secrets masked. OSError where there is no room
        for it."""
        record = _without_secrets(record)
        with open(self.path, "ab", buffering=0) as file:
            end = file.tell()
            if file.write(record) != len(record):
                file.truncate(end)  # half a record would spoil the next one
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """An OSError (full disk) in the block is reported once, and does not stop the run."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                logger.warning(
                    "Cannot write %s (%s): training goes on without it.", self.path, error
                )
            self._warned = True


class MetricsWriter:
    """Appends one JSON object per `write` to `<run_dir>/metrics.jsonl`; for the main process only.

    resume_step: later steps are dropped, so that the file goes on as an uninterrupted run's. None:
    a new file; one that is there is kept as `metrics.<n>.jsonl`. OSError if that cannot be done;
    later, an OSError (full disk) is reported once and costs lines of the file, not the run.
    """

    def __init__(self, run_dir: str | Path, resume_step: int | None = None):
        self.path = Path(run_dir) / "metrics.jsonl"
        self._file = RunFile(self.path)
        if not self.path.exists():
            return
        if resume_step is None:
            self._file.put_aside()
        else:
            old = self.path.read_bytes()
            rows = list(_parse(old, self.path))
            # if a run ended at that step, its summary and what came after it go as well
            ends = (n for n, (_, row) in enumerate(rows)
                    if row["step"] > resume_step
                    or (row["step"] == resume_step and "train_loss" in row))  # fmt: skip
            kept = b"".join(line + b"\n" for line, _ in rows[: next(ends, None)])
            if kept != old:
                write_atomically(self.path, kept)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append {"step": step, **metrics}. NaN and infinities become null: JSON has neither."""
        values = {key: _plain(value) for key, value in metrics.items() if key != "step"}
        record = {"step": step, **values}
        with self._file.reporting():
            self._file.append((json.dumps(record, allow_nan=False) + "\n").encode())


def as_scalar(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value  # numpy scalars, 0-d tensors


def _plain(value: Any) -> Any:
    value = as_scalar(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parse(data: bytes, path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(line, row) of each line; a last line that a kill has cut (no newline) is left out."""
    *lines, tail = data.split(b"\n")
    for number, line in enumerate([*lines, tail], start=1):
        try:
            row = parse_json(line.decode())
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield line, row
        elif number <= len(lines):
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with an integer step, got"
                f" {line[:80]!r}. Remove the line to go on."
            )


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The objects of `<run_dir>/metrics.jsonl` in order, without a last line that a kill has cut.

    FileNotFoundError without the file; ValueError, naming the line, where another one is damaged.
    """
    path = Path(run_dir) / "metrics.jsonl"
    return [row for _, row in _parse(path.read_bytes(), path)]
