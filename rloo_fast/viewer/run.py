"""A run as its files say it is, read anew where they have changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..reports.metric_names import is_user_metric
from ..reports.metrics_file import read_metrics
from ..reports.panels import LEARNING, MAX_USER_PANELS, RUN, Rows, eval_prefixes, kind_of, present
from ..reports.view_format import FOLDER
from ..reports.view_format import RUN as ABOUT
from . import health
from .curves import curves
from .status import seconds_left, status
from .steps import KeptSteps, StepsOfCSV, kept_steps


class Run:
    """`label`: runs of equal label are seeds of one thing, and are drawn as a band."""

    def __init__(self, run_dir: Path, name: str, label: str):
        self.run_dir, self.name, self.label = run_dir, name, label
        self._stamp: tuple[int, int] = (0, 0)
        self._rows: Rows = []
        self._steps: KeptSteps | StepsOfCSV | None = None

    @property
    def rows(self) -> Rows:
        path = self.run_dir / "metrics.jsonl"
        stat = path.stat() if path.exists() else None
        stamp = (stat.st_mtime_ns, stat.st_size) if stat else (0, 0)
        if stamp != self._stamp:
            self._rows, self._stamp = (read_metrics(self.run_dir) if stat else []), stamp
        return self._rows

    @property
    def steps(self) -> KeptSteps | StepsOfCSV | None:
        if not isinstance(self._steps, KeptSteps):
            found = kept_steps(self.run_dir)
            if type(found) is not type(self._steps):
                self._steps = found
        return self._steps

    def require_steps(self) -> KeptSteps | StepsOfCSV:
        if (steps := self.steps) is None:
            raise ValueError(
                f"{self.name} kept no completions: train with view_mib, or log_completions_csv."
            )
        return steps

    def about(self) -> dict[str, Any]:
        """run.json; empty where a run has none."""
        try:
            return json.loads((self.run_dir / FOLDER / ABOUT).read_text())
        except (OSError, ValueError):
            return {}

    # What the page asks for

    def overview(self) -> dict[str, Any]:
        rows, about = self.rows, self.about()
        max_steps = about.get("max_steps")
        state = status(self.run_dir, rows)
        return {
            "name": self.name,
            "label": self.label,
            "status": state,
            "step": rows[-1]["step"] if rows else 0,
            "max_steps": max_steps,
            "seconds_left": seconds_left(rows, max_steps) if state == "running" else None,
            "started": about.get("started"),
            "config": about.get("config"),
            "environment": about.get("environment"),
            "stamp": [*self._stamp, *(self.steps.stamp() if self.steps else ())],
        }

    def curves(self) -> dict[str, Any]:
        rows = self.rows
        logged = present(rows)
        prefixes = eval_prefixes(logged)
        bare = {key.removeprefix(next(filter(key.startswith, prefixes), "")) for key in logged}
        users = sorted(name for name in bare if is_user_metric(name) and name not in LEARNING)
        main = [*LEARNING, *users[:MAX_USER_PANELS], *RUN]
        kinds = {name: kind_of(name, prefixes) for name in main}
        return {
            **curves(rows),
            "eval_prefixes": prefixes,
            "main": main,
            "titles": {name: [kind.title, kind.unit] for name, kind in kinds.items()},
        }

    def summaries(self) -> list[dict[str, Any]]:
        return self.steps.summaries() if self.steps else []

    def health(self) -> list[dict[str, Any]]:
        return health.health(self.rows, self.summaries(), self.about().get("config") or {})


def open_runs(run_dirs: list[Path], names: list[str], labels: list[str]) -> list[Run]:
    """ValueError for a directory that has nothing of a run."""
    for run_dir in run_dirs:
        has = [run_dir / "metrics.jsonl", run_dir / FOLDER / ABOUT, run_dir / ".rloo_lock"]
        if not any(path.exists() for path in has):
            what = "has no files of a run" if run_dir.is_dir() else "is no directory"
            raise ValueError(
                f"{run_dir} {what}: expected the output_dir of a run, with a metrics.jsonl."
            )
    return [Run(d, n, label) for d, n, label in zip(run_dirs, names, labels, strict=True)]
