"""The completions that a run kept: summaries of all steps at once, rows of a step on demand."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from ..reports.columns import MARKS
from ..reports.view_format import SUMMARY, prompt_id, step_files

compute: Any = pyarrow.compute  # has its functions since it was imported, not as written
TOKENS = "token/"
HEAVY = ("messages",)  # of a row, sent where it is opened
MAX_HITS, MAX_SEARCH_S = 200, 5.0

Row = dict[str, Any]


class KeptSteps:
    """`_view/` of a run; files are never rewritten, so what was read of one is kept."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self._summaries: dict[int, dict[str, Any] | None] = {}
        self._tokens: tuple[int, pa.Table] | None = None  # of the step asked for last

    def stamp(self) -> tuple[int, int]:
        """Another one whenever there are other steps."""
        files = step_files(self.run_dir)
        return len(files), max(files, default=0)

    def summaries(self) -> list[dict[str, Any]]:
        """What each step says of all its completions, and the prompts of those that are kept."""
        files = step_files(self.run_dir)
        self._summaries = {
            step: self._summaries.get(step) or _summary(path) for step, path in files.items()
        }
        return [summary for summary in self._summaries.values() if summary]

    def rows(self, step: int) -> list[Row]:
        """The completions of a step, without their tokens. ValueError if it is not kept."""
        path = self._path(step)
        names = [n for n in pq.read_schema(path).names if not n.startswith(TOKENS)]
        return [_plain(row) for row in _read(path, names).to_pylist()]

    def tokens(self, step: int, row: int) -> dict[str, list[Any]]:
        """text, logp, entropy, kl and sampler_diff of the tokens of a row of `rows`; None where a
        value is not known, a name where no row has one left out."""
        table = self._tokens_of(step)
        if not 0 <= row < len(table):
            raise ValueError(f"step {step} has {len(table)} rows, got row {row}.")
        one = table.slice(row, 1)
        return {
            name.removeprefix(TOKENS): [_number(value) for value in one[name][0].as_py()]
            for name in table.column_names
        }

    def _tokens_of(self, step: int) -> pa.Table:
        kept = self._tokens
        if kept is None or kept[0] != step:
            path = self._path(step)
            names = [n for n in pq.read_schema(path).names if n.startswith(TOKENS)]
            kept = self._tokens = step, _read(path, names)
        return kept[1]

    def with_prompt(self, wanted: str) -> list[tuple[int, list[Row]]]:
        """(step, rows) of the completions of this prompt, over the run."""
        found = []
        for step, path in step_files(self.run_dir).items():
            column = _read(path, ["prompt_id"])["prompt_id"]
            if compute.any(compute.equal(column, wanted)).as_py():
                rows = self.rows(step)
                found.append((step, [row for row in rows if row["prompt_id"] == wanted]))
        return found

    def search(self, text: str) -> tuple[list[Row], bool]:
        """(completions with `text`, the newest first, at most MAX_HITS; whether all were seen).

        Small and capital letters are alike.
        """
        started, hits = time.monotonic(), []
        for step, path in reversed(step_files(self.run_dir).items()):
            if time.monotonic() - started > MAX_SEARCH_S or len(hits) >= MAX_HITS:
                return hits[:MAX_HITS], False
            names = ["group", "sample", "completion", "reward"]
            table = _read(path, names)
            mask = compute.match_substring(table["completion"], text, ignore_case=True)
            hits += [{"step": step, **_plain(row)} for row in table.filter(mask).to_pylist()]
        return hits[:MAX_HITS], len(hits) <= MAX_HITS

    def _path(self, step: int) -> Path:
        path = step_files(self.run_dir).get(step)
        if path is None:
            raise ValueError(f"step {step} of {self.run_dir.name} is not kept: view_mib bounds it.")
        return path


class StepsOfCSV:
    """completions.csv of a run, in the same words: prompts, completions, rewards; no tokens."""

    def __init__(self, run_dir: Path):
        self.path = run_dir / "completions.csv"
        self._read_at: tuple[int, int] | None = None
        self._steps: dict[int, list[Row]] = {}

    def stamp(self) -> tuple[int, int]:
        stat = self.path.stat()
        return stat.st_mtime_ns, stat.st_size

    def summaries(self) -> list[dict[str, Any]]:
        self._read()
        return [
            {"step": step, "num_rows": int(rows[0]["num_rows"] or len(rows)), "source": "csv"}
            for step, rows in self._steps.items()
        ]

    def rows(self, step: int) -> list[Row]:
        self._read()
        if step not in self._steps:
            raise ValueError(f"step {step} is not in {self.path.name}.")
        return self._steps[step]

    def tokens(self, step: int, row: int) -> dict[str, list[Any]]:
        return {}

    def with_prompt(self, wanted: str) -> list[tuple[int, list[Row]]]:
        self._read()
        found = [
            (step, [row for row in rows if row["prompt_id"] == wanted])
            for step, rows in self._steps.items()
        ]
        return [(step, rows) for step, rows in found if rows]

    def search(self, text: str) -> tuple[list[Row], bool]:
        self._read()
        hits = (
            {"step": step, **row}
            for step, rows in reversed(self._steps.items())
            for row in rows
            if text.lower() in row["completion"].lower()
        )
        first = list(islice(hits, MAX_HITS + 1))
        return first[:MAX_HITS], len(first) <= MAX_HITS

    def _read(self) -> None:
        stamp = self.stamp()
        if self._read_at == stamp:
            return
        self._read_at, self._steps = stamp, {}
        with open(self.path, newline="", encoding="utf-8") as file:
            for row in _csv_rows(file):
                self._steps.setdefault(row.pop("step"), []).append(row)
        for rows in self._steps.values():
            _number_groups(rows)


def _csv_rows(file: Any) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    for cells in csv.DictReader(file):
        if None in cells.values() or cells.get("mode", "train") != "train":
            continue  # a line that a kill has cut; an evaluation's
        row: Row = {
            "step": int(cells["step"]),
            "num_rows": cells.get("num_rows"),
            "prompt_id": prompt_id(cells["prompt"]),
            "prompt": cells["prompt"],
            "completion": cells["completion"],
            "advantage": _float(cells.get("advantage")),
        }
        known = {*row, *MARKS}
        extra = {name: value for name, value in cells.items() if name not in known}
        rewards = {
            name: value for name, text in extra.items() if (value := _float(text)) is not None
        }
        row |= {f"reward/{name}": value for name, value in rewards.items()}
        row["reward"] = sum(rewards.values()) if len(rewards) == 1 else None
        others = {name: text for name, text in extra.items() if name not in rewards and text}
        row["extra"] = json.dumps(others) if others else None
        yield row


def _number_groups(rows: list[Row]) -> None:
    """Rows of one prompt are a group, in the order of the file."""
    numbers: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for row in rows:
        name = row["prompt_id"]
        row["group"] = numbers.setdefault(name, len(numbers))
        row["sample"] = sizes.get(name, 0)
        sizes[name] = row["sample"] + 1


def kept_steps(run_dir: Path) -> KeptSteps | StepsOfCSV | None:
    """What a run kept of its completions, the fuller first; None: nothing."""
    if step_files(run_dir):
        return KeptSteps(run_dir)
    return StepsOfCSV(run_dir) if (run_dir / "completions.csv").is_file() else None


def _read(path: Path, names: list[str]) -> pa.Table:
    """Not by read_table, which first imports pandas and takes a second for it."""
    return pq.ParquetFile(path).read(columns=names)


def _summary(path: Path) -> dict[str, Any] | None:
    """None for a file that is damaged, or was dropped just now."""
    try:
        metadata = pq.read_metadata(path).metadata or {}
        return json.loads(metadata[SUMMARY])
    except (OSError, KeyError, ValueError, pa.ArrowInvalid):
        return None


def _plain(row: Row) -> Row:
    return {name: _number(value) for name, value in row.items()}


def _number(value: Any) -> Any:
    """JSON has no NaN, and float16 prints as many digits as it has."""
    if value is None or isinstance(value, str | int):
        return value
    value = float(value)
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _float(text: str | None) -> float | None:
    try:
        value = float(text) if text else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None
