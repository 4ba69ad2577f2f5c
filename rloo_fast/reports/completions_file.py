"""completions.csv: the samples of a run, for a spreadsheet or pandas."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pandas as pd

from .metrics_file import RunFile, write_atomically


class CompletionsWriter:
    """Appends tables of `completions_dataframe` to `<run_dir>/completions.csv`; main process only.

    One line of names, then one row per completion: texts in quotes, numbers not, nothing where a
    value is missing. resume_step: later steps are dropped, and a row that a kill has cut. None: a
    new file; one that is there is kept as `completions.<n>.csv`. OSError if that cannot be done;
    later, an OSError (full disk) is reported once and costs rows of the file, not the run.
    """

    def __init__(self, run_dir: str | Path, resume_step: int | None = None):
        self.path = Path(run_dir) / "completions.csv"
        self._file = RunFile(self.path)
        self._columns: list[str] = []
        if not self.path.exists():
            return
        if resume_step is None:
            self._file.put_aside()
            return
        records = self._records()
        ends = (n for n, row in enumerate(records[1:], start=1) if self._step(row) > resume_step)
        write_atomically(self.path, b"".join(records[: next(ends, None)]))
        if records:
            self._columns = next(csv.reader([records[0].decode()]))

    def write(self, frame: pd.DataFrame) -> None:
        """Append the rows. A column that the file lacks is added to it, empty in earlier rows."""
        with self._file.reporting():
            if new := [name for name in frame.columns if name not in self._columns]:
                self._add_columns(new)
            self._file.append(_as_csv(frame.reindex(columns=self._columns), header=False))

    def _add_columns(self, names: list[str]) -> None:
        columns = [*self._columns, *names]
        rows = self._records()[1:] if self._columns else []
        empty = b"," * len(names) + b"\n"
        wider = [row.removesuffix(b"\n") + empty for row in rows]
        header = _as_csv(pd.DataFrame(columns=columns), header=True)
        write_atomically(self.path, b"".join([header, *wider]))
        self._columns = columns

    def _records(self) -> list[bytes]:
        """The header and the rows, without a last one that is cut. A row may have several lines:
        it ends with the first of them that leaves no quote open."""
        records, lines, is_open = [], [], False
        for line in io.BytesIO(self.path.read_bytes()):
            lines.append(line)
            is_open ^= line.count(b'"') % 2 == 1
            if line.endswith(b"\n") and not is_open:
                records.append(b"".join(lines))
                lines.clear()
        return records

    def _step(self, row: bytes) -> int:
        try:
            return int(row.split(b",", 1)[0])
        except ValueError:
            raise ValueError(
                f"{self.path}: expected rows that begin with a step, got {row[:80]!r}. Move the "
                "file away to go on with a new one."
            ) from None


def _as_csv(frame: pd.DataFrame, header: bool) -> bytes:
    text = frame.to_csv(
        index=False, header=header, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n"
    )
    return text.encode(errors="backslashreplace")  # half a surrogate pair
