"""Curves of one or more runs as a PNG, from their metrics.jsonl.

Metric names are those of `RLOOTrainer`'s log; evaluation's carry the prefix `eval_`.
"""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

from .metrics_file import read_metrics, write_atomically
from .panels import Panel, Rows, choose_panels, is_value, panel_of, present

X_AXES = {  # what curves may be drawn over: the axis' name
    "step": "optimizer step",
    "num_tokens": "tokens of prompts and completions",
    "time": "time in steps, evaluations left out",
}
TIME_UNITS = ((7200, 3600, "hours"), (120, 60, "minutes"), (0, 1, "seconds"))  # from, s, name


def plot_curves(
    run_dirs: Sequence[str | Path],
    output: str | Path,
    keys: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    x: str = "step",
) -> None:
    """PNG, 1000 px wide: one panel per metric over `x` (of X_AXES), all runs in each.

    Faint: as logged; bold: the running mean of `panels.curve`. A gap is a value that was not
    finite. With one run, its evaluations are drawn beside training, and the parts of its reward
    (rewards/*/mean) in the reward's panel. Runs of equal label are one line: the mean of their bold
    lines, in a band from the least to the largest, as far as all of them go.

    keys: the metrics, in order; default: `panels.LEARNING`, what reward functions logged, and
    `panels.RUN`, where present. labels: one per run; default: the directories' names. ValueError if
    a directory has no metrics, none but NaN, or comes twice, if no run has a value of a metric, and
    for an output that is no .png file.
    """
    # here, not above: a trainer that draws nothing need not load matplotlib on every rank
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    from .drawing import add_legend, draw_panel, dress

    paths = [Path(run_dir) for run_dir in run_dirs]
    _check_output(Path(output))
    runs = _read_runs(paths, run_names(paths) if labels is None else labels, x)
    every_row = [row for group in runs.values() for rows in group for row in rows]
    panels, left_out = _panels(every_row, keys, is_alone=len(paths) == 1)
    num_columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    num_rows = math.ceil(len(panels) / num_columns)
    height = {1: 3.4, 2: 6.0}.get(num_rows, 2.5 * num_rows + 0.5)
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(10.0, height), dpi=100, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    x_label = _scale_x(every_row, x)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(num_rows, num_columns, index + 1)
        axes.set_xlim(*_x_limits(every_row))
        draw_panel(axes, runs, panel)
        is_bottom = index + num_columns >= len(panels)
        dress(axes, panel.kind, x_label if is_bottom else "")
    add_legend(figure, is_alone=len(paths) == 1, left_out=left_out)
    figure.align_ylabels()
    png = io.BytesIO()
    figure.savefig(png, format="png")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(output), png.getvalue())


def _panels(
    rows: Rows, keys: Sequence[str] | None, is_alone: bool
) -> tuple[list[Panel], list[str]]:
    """(panels, metrics of the user's that are left out). ValueError for a metric without values."""
    logged = present(rows)
    panels, left_out = choose_panels(rows, is_alone)
    missing = [key for key in keys or () if key not in logged]
    if missing or not (keys or panels):
        nan = sorted({key for row in rows for key in row} - logged - {"step", "x"})
        only = f" Only NaN or infinite: {nan}." if nan else ""
        sought = f"values of {missing}" if missing else "metrics that are drawn by themselves"
        raise ValueError(f"No {sought}; logged are {sorted(logged)}.{only}")
    return ([panel_of(key, logged) for key in keys], []) if keys else (panels, left_out)


def _x_limits(rows: Rows) -> tuple[float, float]:
    """From 0, or from where a run begins that was resumed into a directory of its own."""
    places = [row["x"] for row in rows]
    first, last = min(places), max(places) or 1
    first = first if first > max(0.25 * last, 20) else 0
    return first - 0.02 * (last - first), last + 0.02 * (last - first)


def _check_output(output: Path) -> None:
    if output.is_dir():
        raise ValueError(f"output {output} is a directory: write {output / 'curves.png'}.")
    if output.suffix.lower() != ".png":
        raise ValueError(f"output {output}: curves are written as a PNG, so end its name in .png.")


def run_names(run_dirs: list[Path]) -> list[str]:
    """The directories' names, with those above them if two are equal."""
    names = [run_dir.resolve().name for run_dir in run_dirs]
    if len(set(names)) < len(names):
        top = os.path.commonpath([run_dir.resolve() for run_dir in run_dirs])
        names = [os.path.relpath(run_dir.resolve(), top) for run_dir in run_dirs]
    return names


def _read_runs(run_dirs: list[Path], labels: Sequence[str], x: str) -> dict[str, list[Rows]]:
    """label -> the runs of that label."""
    if x not in X_AXES:
        raise ValueError(f"x must be one of {list(X_AXES)}, got {x!r}.")
    if len(labels) != len(run_dirs):
        raise ValueError(
            f"{len(labels)} labels for {len(run_dirs)} directories: expected one for each; equal "
            f"labels make one line of several runs. Got {list(labels)}."
        )
    resolved = [run_dir.resolve() for run_dir in run_dirs]
    twice = [str(run_dir) for run_dir in run_dirs if resolved.count(run_dir.resolve()) > 1]
    if twice:
        raise ValueError(f"One run is given more than once: {', '.join(twice)}; give each once.")
    runs: dict[str, list[Rows]] = {}
    for label, run_dir in zip(labels, run_dirs, strict=True):
        rows = read_metrics(run_dir) if (run_dir / "metrics.jsonl").is_file() else []
        if not rows:
            raise ValueError(
                f"No metrics in {run_dir}: expected a metrics.jsonl with a line or more."
            )
        if not present(rows) - {"epoch"}:
            raise ValueError(f"{run_dir} has nothing to draw: all its metrics are NaN or infinite.")
        place_rows(rows, x)
        runs.setdefault(label, []).append(rows)
    return runs


def place_rows(rows: Rows, x: str) -> None:
    """Put each row's place on the x axis under "x"; what lacks one stands where the row before is.

    time: step_time is a mean over the steps since the log before.
    """
    place, last_step = 0.0, 0
    for row in rows:
        if x == "step":
            place = row["step"]
        elif x == "num_tokens":
            place = row["num_tokens"] if is_value(row.get("num_tokens")) else place
        elif is_value(row.get("step_time")):
            place += row["step_time"] * (row["step"] - last_step)
            last_step = row["step"]
        row["x"] = place


def _scale_x(rows: Rows, x: str) -> str:
    """The x axis' name; times are put into hours or minutes where they are long."""
    if x != "time":
        return X_AXES[x]
    longest = max(row["x"] for row in rows)
    seconds, unit = next((s, name) for least, s, name in TIME_UNITS if longest >= least)
    for row in rows:
        row["x"] /= seconds
    return f"{X_AXES[x]} ({unit})"
