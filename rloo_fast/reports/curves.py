"""Curves of one or more runs as a PNG, from their metrics.jsonl.

Metric names are those of `RLOOTrainer`'s log; evaluation's carry the prefix `eval_`.
"""

import fnmatch
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .metrics_file import read_metrics, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
DASHES = ("-", "--", ":")  # a seventh run takes the first colour again, dashed
PANELS = {  # metric: (title, unit)
    "reward": ("Reward", "mean per completion"),
    "accuracy": ("Accuracy, training prompts", "share correct"),
    "kl": ("KL to the reference", "nats per token"),
    "entropy": ("Entropy", "nats per token"),
    "completions/mean_length": ("Completion length", "tokens"),
    "eval_accuracy": ("Accuracy, held-out prompts", "share correct"),
    "eval_reward": ("Evaluation: reward", "mean per completion"),
}
X_AXES = {  # what curves may be drawn over: the axis' name
    "step": "optimizer step",
    "num_tokens": "tokens of prompts and completions",
    "time": "time in steps, evaluations left out",
}
TIME_UNITS = ((7200, 3600, "hours"), (120, 60, "minutes"), (0, 1, "seconds"))  # from, s, name

Rows = list[dict[str, Any]]  # of one run's metrics.jsonl; its place on the x axis under "x"


def plot_curves(
    run_dirs: Sequence[str | Path],
    output: str | Path,
    keys: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    x: str = "step",
) -> None:
    """PNG, 1000 px wide: one panel per metric over `x` (of X_AXES), all runs in each.

    Light: as logged; bold: centred mean over a fifteenth of the logs. With one run the parts of its
    reward (rewards/*/mean) are drawn too. Runs of equal label are one line: the mean of their bold
    lines, in a band from the least to the largest, as far as all of them go.

    keys: the metrics, in order; default: `PANELS`, where present. labels: one per run; default: the
    directories' names. ValueError if a directory has no metrics, none but NaN, or comes twice, if
    no run has a value of a metric, and for an output that is no .png file.
    """
    # here, not above: a trainer that draws nothing need not load matplotlib on every rank
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    paths = [Path(run_dir) for run_dir in run_dirs]
    _check_output(Path(output))
    runs = _read_runs(paths, _names(paths) if labels is None else labels, x)
    every_row = [row for group in runs.values() for rows in group for row in rows]
    present = _present(every_row)
    wanted = list(keys or (key for key in PANELS if key in present))
    missing = [key for key in keys or PANELS if key not in present]
    if not wanted or (keys and missing):
        nan = sorted({key for row in every_row for key in row} - present - {"step", "x"})
        only = f" Only NaN or infinite: {nan}." if nan else ""
        raise ValueError(f"No values of {missing}; logged are {sorted(present)}.{only}")

    num_columns = {1: 1, 2: 2, 4: 2}.get(len(wanted), 3)
    num_rows = math.ceil(len(wanted) / num_columns)
    height = {1: 3.4, 2: 6.0}.get(num_rows, 2.8 * num_rows)
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(10.0, height), dpi=100, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    x_label = _scale_x(every_row, x)
    last = max(row["x"] for row in every_row)
    for index, key in enumerate(wanted):
        axes = figure.add_subplot(num_rows, num_columns, index + 1)
        _draw_panel(axes, runs, key)
        is_bottom = index + num_columns >= len(wanted)
        _dress(axes, *PANELS.get(key, (key, "")), x_label if is_bottom else "")
        axes.set_xlim(0, 1.02 * (last or 1))
    if len(paths) > 1:
        _add_legend(figure)
    figure.align_ylabels()
    png = io.BytesIO()
    figure.savefig(png, format="png")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(output), png.getvalue())


def _check_output(output: Path) -> None:
    if output.is_dir():
        raise ValueError(f"output {output} is a directory: write {output / 'curves.png'}.")
    if output.suffix.lower() != ".png":
        raise ValueError(f"output {output}: curves are written as a PNG, so end its name in .png.")


def _names(run_dirs: list[Path]) -> list[str]:
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
        if not _present(rows) - {"epoch"}:
            raise ValueError(f"{run_dir} has nothing to draw: all its metrics are NaN or infinite.")
        _place(rows, x)
        runs.setdefault(label, []).append(rows)
    return runs


def _place(rows: Rows, x: str) -> None:
    """Put each row's place on the x axis under "x"; what lacks one stands where the row before is.

    time: step_time is a mean over the steps since the log before.
    """
    place, last_step = 0.0, 0
    for row in rows:
        if x == "step":
            place = row["step"]
        elif x == "num_tokens":
            place = row["num_tokens"] if _is_value(row.get("num_tokens")) else place
        elif _is_value(row.get("step_time")):
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


def _present(rows: Rows) -> set[str]:
    """The metrics with a value somewhere."""
    return {key for row in rows for key in row if _is_value(row[key])} - {"step", "x"}


def _is_value(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """y_i = mean of the values within window // 2 places of i; at the ends, of those there are."""
    ones = np.ones(2 * (window // 2) + 1)
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


def _draw_panel(axes: "Axes", runs: dict[str, list[Rows]], key: str) -> None:
    is_alone = len(runs) == 1
    for number, (label, group) in enumerate(runs.items()):
        if len(group) > 1:
            _draw_group(axes, group, key, number, label)
        else:
            _draw(axes, group[0], key, number, "weighted sum" if is_alone else label)
    if key == "reward" and is_alone:
        ((rows, *others),) = runs.values()
        parts = sorted(fnmatch.filter({key for row in rows for key in row}, "rewards/*/mean"))
        if len(parts) > 1 and not others:
            for number, part in enumerate(parts, start=1):
                name = part.removeprefix("rewards/").removesuffix("/mean")
                _draw(axes, rows, part, number, name, is_part=True)
            axes.legend(frameon=False, fontsize=8)


def _curve(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(places, values as logged, their running mean); few logs are their own mean."""
    rows = [row for row in rows if _is_value(row.get(key))]
    places = np.array([row["x"] for row in rows], dtype=float)
    values = np.array([row[key] for row in rows], dtype=float)
    is_short = len(values) <= 30
    return places, values, values if is_short else running_mean(values, len(values) // 15)


def _style(number: int) -> dict[str, Any]:
    """Colour and dashes of a panel's line with this number."""
    dashes = DASHES[number // len(COLORS) % len(DASHES)]
    return {"color": COLORS[number % len(COLORS)], "linestyle": dashes}


def _add_legend(figure: "Figure") -> None:
    """One entry per label below the panels, and what a band is."""
    from matplotlib.patches import Patch

    entries = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if any(axes.collections for axes in figure.axes):
        entries["band: least to largest"] = Patch(color="0.85")
    figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=4, frameon=False
    )


def _draw(
    axes: "Axes", rows: Rows, key: str, number: int, label: str, is_part: bool = False
) -> None:
    places, values, smooth = _curve(rows, key)
    if not len(values):
        return
    style = _style(number)
    if smooth is not values and not is_part:
        axes.plot(places, values, color=style["color"], alpha=0.25, linewidth=0.8)
    width = 1.2 if is_part else 2.0
    axes.plot(places, smooth, **style, linewidth=width, label=label)
    if smooth is values:
        axes.plot(places, values, "o", color=style["color"], markersize=3.5)


def _draw_group(axes: "Axes", group: list[Rows], key: str, number: int, label: str) -> None:
    """One line of several runs: their mean, in a band from the least to the largest."""
    curves = [(places, smooth) for places, _, smooth in (_curve(rows, key) for rows in group)]
    curves = [(places, smooth) for places, smooth in curves if len(places)]
    if not curves:
        return
    first = max(places[0] for places, _ in curves)
    last = min(places[-1] for places, _ in curves)
    every = np.unique(np.concatenate([places for places, _ in curves]))
    grid = every[(every >= first) & (every <= last)]
    values = np.stack([np.interp(grid, places, smooth) for places, smooth in curves])
    style = _style(number)
    low, high = values.min(axis=0), values.max(axis=0)
    axes.fill_between(grid, low, high, color=style["color"], alpha=0.18, linewidth=0)
    name = f"{label} (mean of {len(curves)} runs)"
    axes.plot(grid, values.mean(axis=0), **style, linewidth=2.0, label=name)


def _dress(axes: "Axes", title: str, unit: str, x_label: str) -> None:
    """Titles, ticks and grid; without an `x_label` the panel below shows the numbers of x."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axes.set_ylabel(unit, fontsize=9)
    axes.set_xlabel(x_label, fontsize=9)
    axes.tick_params(labelsize=8, length=3, color="0.6", labelbottom=bool(x_label))
    is_time = "time" in x_label
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=not is_time))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.ticklabel_format(axis="y", useOffset=False)
    if "tokens" in x_label:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.6")
