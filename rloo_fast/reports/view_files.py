"""_view/: the completions of a run with their tokens, and what the run is, for `rloo-fast view`."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .metrics_file import RunFile, write_atomically
from .view_format import FOLDER, FORMAT, RUN, SUMMARY, step_file, step_files

logger = logging.getLogger(__name__)

NUM_RECENT = 8  # newest steps that are thinned out last
SHARE_OF_STEP = 32  # a step takes at most this part of what all may take
MIB = 1 << 20


class ViewWriter:
    """Writes `<run_dir>/_view/`: run.json, and a Parquet file per step; main process only.

    max_mib: what the steps may take; beyond, every second of them is dropped, then of the rest.
    resume_step: later steps are dropped. None: a new folder, one that is there is kept as
    `_view.<n>`. An OSError (full disk) is reported once and costs steps, not the run.
    """

    def __init__(self, run_dir: str | Path, max_mib: int, resume_step: int | None = None):
        self.run_dir, self.max_bytes = Path(run_dir), max_mib * MIB
        self.folder = self.run_dir / FOLDER
        self._file = RunFile(self.folder / RUN)
        if resume_step is None and any(self.folder.iterdir()):
            self._put_aside()
        for step, path in step_files(self.run_dir).items():
            if resume_step is not None and step > resume_step:
                path.unlink()
        self._sizes = {step: path.stat().st_size for step, path in step_files(self.run_dir).items()}

    def _put_aside(self) -> None:
        names = (self.folder.with_name(f"{FOLDER}.{n}") for n in itertools.count(1))
        kept_as = next(name for name in names if not name.exists())
        self.folder.rename(kept_as)
        self.folder.mkdir()
        logger.info("%s is a former run's: kept as %s.", self.folder, kept_as.name)

    def write_run(self, about: Mapping[str, Any]) -> None:
        """run.json: the settings of the run, its steps, the versions it runs on."""
        data = json.dumps({"format": FORMAT, **about}, indent=1, default=str)
        with self._file.reporting():
            write_atomically(self.folder / RUN, data.encode(errors="backslashreplace"))

    def write(self, step: int, table: pa.Table, summary: Mapping[str, Any]) -> None:
        """The completions of a step, whole or not at all; then what is too much is dropped."""
        about = {"format": FORMAT, "step": step, **summary}
        table = table.replace_schema_metadata({SUMMARY: json.dumps(about)})
        path = step_file(self.run_dir, step)
        beside = path.with_name(f".{path.name}.tmp")
        with self._file.reporting():
            try:
                pq.write_table(table, beside, compression="zstd")
                beside.replace(path)
            finally:
                beside.unlink(missing_ok=True)
            self._sizes[step] = path.stat().st_size
            self._thin_out()

    def _thin_out(self) -> None:
        for step in to_drop(self._sizes, self.max_bytes):
            step_file(self.run_dir, step).unlink(missing_ok=True)
            del self._sizes[step]


def to_drop(sizes: Mapping[int, int], max_bytes: int) -> list[int]:
    """Steps to drop, so that the rest fits: the odd ones, then those that 4 does not divide, and
    so on, so that what stays is spread over the run; of the newest `NUM_RECENT` the oldest, last,
    and never the newest."""
    steps, left, dropped = sorted(sizes), sum(sizes.values()), []
    old, recent = steps[:-NUM_RECENT], steps[-NUM_RECENT:]
    stride = 2
    while left > max_bytes and len(dropped) < len(old):
        for step in [s for s in old if s % stride and s not in {*dropped}]:
            dropped.append(step)
            left -= sizes[step]
        stride *= 2
    for step in recent[:-1]:
        if left <= max_bytes:
            break
        dropped.append(step)
        left -= sizes[step]
    return dropped
