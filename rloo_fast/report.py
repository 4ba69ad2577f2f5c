"""What people look at during and after a run: the progress line and the curves.

Metric names are those of `RLOOTrainer`'s log; evaluation's carry the prefix `eval_`.
"""

import fnmatch
import io
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback

if TYPE_CHECKING:
    from matplotlib.axes import Axes

from .metrics_file import read_metrics, write_atomically

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


def plot_curves(
    run_dirs: Sequence[str | Path], output: str | Path, keys: Sequence[str] | None = None
) -> None:
    """PNG, 1000 px wide: one panel per metric over the optimizer step, all runs in each.

    Light: as logged; bold: centred mean over a fifteenth of the logs. With one run the parts of its
    reward (rewards/*/mean) are drawn too. keys: the metrics, in order; default: `PANELS`, where
    present. ValueError if a directory has no metrics, or no run has a value of a wanted metric.
    """
    # here, not above: a trainer that draws nothing need not load matplotlib on every rank
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    runs = _read_runs([Path(run_dir) for run_dir in run_dirs])
    present = {key for rows in runs.values() for row in rows for key in row if _is_value(row[key])}
    wanted = list(keys or (key for key in PANELS if key in present))
    missing = [key for key in keys or PANELS if key not in present]
    if not wanted or (keys and missing):
        raise ValueError(f"No values of {missing}; logged are {sorted(present - {'step'})}.")

    num_columns = {1: 1, 2: 2, 4: 2}.get(len(wanted), 3)
    num_rows = math.ceil(len(wanted) / num_columns)
    height = {1: 3.4, 2: 6.0}.get(num_rows, 2.8 * num_rows)
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(10.0, height), dpi=100, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    for index, key in enumerate(wanted):
        axes = figure.add_subplot(num_rows, num_columns, index + 1)
        _dress(axes, *PANELS.get(key, (key, "")), is_bottom=index + num_columns >= len(wanted))
        _draw_panel(axes, runs, key)
    if len(runs) > 1:
        lines = {line.get_label(): line for axes in figure.axes for line in _named_lines(axes)}
        figure.legend(
            list(lines.values()), list(lines), loc="outside lower center", ncols=4, frameon=False
        )
    figure.align_ylabels()
    png = io.BytesIO()
    figure.savefig(png, format="png")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(output), png.getvalue())


def _read_runs(run_dirs: list[Path]) -> dict[str, list[dict[str, Any]]]:
    """label -> rows; the label is the directory's name, with those above it if names are equal."""
    names = [run_dir.resolve().name for run_dir in run_dirs]
    if len(set(names)) < len(names):
        top = os.path.commonpath([run_dir.resolve() for run_dir in run_dirs])
        names = [os.path.relpath(run_dir.resolve(), top) for run_dir in run_dirs]
    runs = {}
    for name, run_dir in zip(names, run_dirs, strict=True):
        runs[name] = read_metrics(run_dir) if (run_dir / "metrics.jsonl").is_file() else []
        if not runs[name]:
            raise ValueError(
                f"No metrics in {run_dir}: expected a metrics.jsonl with a line or more."
            )
    return runs


def _is_value(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """y_i = mean of the values within window // 2 places of i; at the ends, of those there are."""
    ones = np.ones(2 * (window // 2) + 1)
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


def _draw_panel(axes: "Axes", runs: dict[str, list[dict[str, Any]]], key: str) -> None:
    is_alone = len(runs) == 1
    for number, (label, rows) in enumerate(runs.items()):
        _draw(axes, rows, key, number, "weighted sum" if is_alone else label)
    if key == "reward" and is_alone:
        (rows,) = runs.values()
        parts = sorted(fnmatch.filter({key for row in rows for key in row}, "rewards/*/mean"))
        if len(parts) > 1:
            for number, part in enumerate(parts, start=1):
                name = part.removeprefix("rewards/").removesuffix("/mean")
                _draw(axes, rows, part, number, name, is_part=True)
            axes.legend(frameon=False, fontsize=8)
    last = max(row["step"] for rows in runs.values() for row in rows)
    axes.set_xlim(0, 1.02 * max(last, 1))


def _draw(
    axes: "Axes",
    rows: list[dict[str, Any]],
    key: str,
    number: int,
    label: str,
    is_part: bool = False,
) -> None:
    rows = [row for row in rows if _is_value(row.get(key))]
    if not rows:
        return
    steps = [row["step"] for row in rows]
    values = np.array([row[key] for row in rows], dtype=float)
    color, dashes = COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)]
    is_short = len(values) <= 30  # few logs: drawn as they are
    if not is_short and not is_part:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    smooth = values if is_short else running_mean(values, window=len(values) // 15)
    width = 1.2 if is_part else 2.0
    axes.plot(steps, smooth, dashes, color=color, linewidth=width, label=label)
    if is_short:
        axes.plot(steps, values, "o", color=color, markersize=3.5)


def _named_lines(axes: "Axes") -> list[Any]:
    return [line for line in axes.lines if not str(line.get_label()).startswith("_")]


def _dress(axes: "Axes", title: str, unit: str, is_bottom: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axes.set_ylabel(unit, fontsize=9)
    axes.set_xlabel("optimizer step" if is_bottom else "", fontsize=9)
    axes.tick_params(labelsize=8, length=3, color="0.6", labelbottom=is_bottom)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.6")


def progress_line(logs: Mapping[str, Any], step: int, max_steps: int) -> str | None:
    """The log as one line, absent values left out; None if it has no metric that a line shows."""
    runtimes = (k for k in logs if k.startswith(("eval_", "train_")) and k.endswith("_runtime"))
    is_eval = any(key.startswith("eval_") for key in logs)
    # "eval_<name>_" where there are several evaluation sets; metrics of ours still say "eval_"
    prefix = next(runtimes, "eval_runtime" if is_eval else "").removesuffix("runtime")

    def show(key: str, form: str | Callable[[float], str]) -> str | None:
        value = logs.get(prefix + key, logs.get(f"eval_{key}"))
        if not isinstance(value, int | float):
            return None
        return form.format(value) if isinstance(form, str) else form(value)

    parts = [
        show("accuracy", "accuracy {:.3f}"),
        show("reward", "reward {:.3f}" + (show("reward_std", " ± {:.3f}") or "")),
        show("kl", "kl {:.3g}"),
        show("entropy", "entropy {:.3g}"),
        show("completions/mean_length", "length {:.0f}"),
        show("completions/clipped_ratio", "clipped {:.0%}"),
        show("throughput/completion_tokens_per_s", lambda number: f"{_short(number)} tok/s"),
        show("step_time", "{:.3g} s/step"),
        show("learning_rate", "lr {:.2g}"),
        show("loss", "loss {:.3g}"),
        show("grad_norm", "grad {:.3g}"),
        show("runtime", lambda seconds: f"took {timedelta(seconds=round(seconds))}"),
    ]
    shown = [part for part in parts if part]
    if not shown:
        return None
    what = prefix.rstrip("_") or "step"
    # max_steps is 0 in an evaluation without training
    where = f"{step:>{len(str(max_steps))}}/{max_steps}" if max_steps > 0 else f"{step}"
    return "  ".join([f"{what} {where}", *shown])


def _short(number: float) -> str:
    """1234 -> 1.23k"""
    for unit in ("", "k", "M"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}G"


class CompactProgress(ProgressCallback):
    """A bar over optimizer steps that starts at the resumed step, and `progress_line` per log.

    Replaces transformers' ProgressCallback. Off a terminal there is no bar, only the lines. A log
    with none of the line's metrics is printed as transformers does.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                dynamic_ncols=True,
                disable=None,  # where stderr is no terminal
            )
        self.current_step = state.global_step

    def on_prediction_step(self, args, state, control, **kwargs):
        if sys.stderr.isatty():
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        line = progress_line(logs or {}, state.global_step, state.max_steps)
        if line is None:
            super().on_log(args, state, control, logs=logs, **kwargs)
        else:
            tqdm.write(line)
