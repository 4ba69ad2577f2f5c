"""What people look at during and after a run: progress line, completions, metrics.jsonl, curves.

Metric names are those of `RLOOTrainer`'s log; evaluation's carry the prefix `eval_`.
"""

import errno
import fnmatch
import importlib
import io
import itertools
import json
import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

# --- completions ----------------------------------------------------------------------------------

MAX_CELL_CHARS = 1000  # a longer text is printed as its two ends
PIPE_WIDTH = 120  # characters per line where there is no terminal to ask (CI, a log file)
MIN_TEXT_WIDTH = 40  # of the columns prompt and completion together
TEXTS = ("prompt", "completion")
RESERVED_COLUMNS = ("step", "prompt", "completion", "advantage")
CONTROL_PICTURES = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"}


def message_text(entry: Any) -> str:
    """One prompt or completion as text: a string as it is, messages as `role: text` lines."""
    if not (isinstance(entry, list) and entry and all(isinstance(m, dict) for m in entry)):
        return entry if isinstance(entry, str) else str(entry)
    return "\n".join(f"{m.get('role', '?')}: {_content_text(m)}" for m in entry)


def _content_text(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    if not isinstance(content, str):  # a list of typed blocks
        content = "".join(
            b["text"] if b.get("type") == "text" else f"[{b['type']}]" for b in content
        )
    parts = [f"({message['reasoning_content']})"] if message.get("reasoning_content") else []
    parts += [content] if content else []
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        parts.append(f"{function.get('name', '?')}({function.get('arguments', '')})")
    return "\n".join(parts)


def completions_dataframe(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    rewards: Mapping[str, Sequence[float | None]],
    advantages: Sequence[float | None],
    step: int,
    extra: Mapping[str, Sequence[Any]] | None = None,
    unique_prompts: bool = False,
) -> pd.DataFrame:
    """One row per completion: step, prompt, completion, one column per reward, extra…, advantage.

    Messages become `role: text`; a reward of None becomes NaN. `unique_prompts` keeps the first
    completion of each prompt. ValueError for columns of different lengths or with equal names.
    """
    extra = extra or {}
    columns = {
        "prompt": [message_text(p) for p in prompts],
        "completion": [message_text(c) for c in completions],
        **rewards,
        **extra,
        "advantage": advantages,
    }
    names = [*RESERVED_COLUMNS, *rewards, *extra]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"Completion tables need distinct column names, {twice} came twice: rename."
        )
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"Expected one value per completion in every column, got {lengths}.")
    frame = pd.DataFrame({name: _table_column(column) for name, column in columns.items()})
    frame.insert(0, "step", step)
    return frame.drop_duplicates("prompt", ignore_index=True) if unique_prompts else frame


def _table_column(values: Sequence[Any]) -> pd.Series:
    """float64 where all values are numbers or None, else text: trackers refuse mixed columns."""
    if all(value is None or isinstance(value, int | float) for value in values):
        return pd.Series(values, dtype="float64")
    return pd.Series([None if v is None else message_text(v) for v in values], dtype="object")


def print_completions(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    rewards: Mapping[str, Sequence[float | None]],
    advantages: Sequence[float | None],
    step: int,
    num_samples: int | None = None,
    extra: Mapping[str, Sequence[Any]] | None = None,
    unique_prompts: bool = False,
    seed: int = 0,
) -> None:
    """Print `completions_dataframe` as a panel on stdout, one row per completion.

    `num_samples` rows are drawn with (seed, step), in their order; no global random state is used.
    Texts are folded: the table is as wide as the terminal (COLUMNS or `PIPE_WIDTH` without one), or
    wider where its columns would leave a text less than `MIN_TEXT_WIDTH`. A text beyond
    `MAX_CELL_CHARS` says how much of its middle is left out. None and NaN are "–".
    """
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples must be >= 1, or None for all, got {num_samples}.")
    frame = completions_dataframe(
        prompts, completions, rewards, advantages, step, extra, unique_prompts
    )
    total = len(frame)
    if num_samples is not None and num_samples < total:
        rows = random.Random(f"{seed},{step}").sample(range(total), num_samples)
        frame = frame.iloc[sorted(rows)]

    frame = frame.drop(columns="step")
    console = Console()
    has_width = console.is_terminal or "COLUMNS" in os.environ
    widths = _column_widths(list(frame.columns), console.width if has_width else PIPE_WIDTH)
    borders = 5 + 3 * len(widths)
    console = Console(width=borders + sum(widths.values()))
    table = Table(show_lines=True, header_style="bold")
    for name, width in widths.items():
        header = name.capitalize() if name in RESERVED_COLUMNS else name
        justify = "right" if frame[name].dtype == "float64" else "left"
        table.add_column(_cell(header, console), width=width, justify=justify, overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(*(_cell(value, console) for value in row))
    shown = f"{len(frame)} of {total} completions"
    console.print(Panel(table, title=f"Step {step}", subtitle=shown))


def _column_widths(names: list[str], console_width: int) -> dict[str, int]:
    """Prompt and completion share, 2 : 3, what the other columns leave; set here, since rich would
    shrink those two to a letter per line before any number."""
    room = console_width - 5 - 3 * len(names)
    widths, rest = {}, 0
    for widest in (16, 9, 7):  # 7: -12.345
        widths = {name: min(max(len(name), 7), widest) for name in names}
        rest = room - sum(width for name, width in widths.items() if name not in TEXTS)
        if rest >= MIN_TEXT_WIDTH:
            break
    rest = max(rest, MIN_TEXT_WIDTH)
    return widths | {"prompt": rest * 2 // 5, "completion": rest - rest * 2 // 5}


def _cell(value: Any, console: Console) -> Text:
    """Text as it may be printed: no markup, no escape sequences, nothing stdout cannot encode."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        text = "–"
    elif isinstance(value, str):
        text = value.translate(CONTROL_PICTURES)
        if (left_out := len(text) - MAX_CELL_CHARS) > 0:
            half = MAX_CELL_CHARS // 2
            text = f"{text[:half]} […{left_out} characters left out…] {text[-half:]}"
    else:
        text = f"{value:.3f}"
    encoding = console.encoding
    return Text(text.encode(encoding, "backslashreplace").decode(encoding))


def log_completions_table(report_to: Sequence[str], frame: pd.DataFrame) -> None:
    """Send `frame` as table `completions` to wandb and trackio, where chosen and a run is on."""
    if frame.empty:
        return
    for name in ("wandb", "trackio"):
        tracker = _active_tracker(name) if name in report_to else None
        if tracker is not None:
            step = int(
                frame["step"].iloc[-1]
            )  # the x axis that transformers' callbacks log against
            table = tracker.Table(dataframe=frame)
            tracker.log({"completions": table, "train/global_step": step})


def _active_tracker(name: str) -> Any | None:
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    # getattr: a run directory called wandb/ imports as an empty namespace package
    if name == "wandb":
        return module if getattr(module, "run", None) is not None else None
    context = getattr(module, "context_vars", None)
    return module if context is not None and context.current_run.get() is not None else None


# --- metrics.jsonl --------------------------------------------------------------------------------


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: a reader or a kill finds the old file or the new, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


class MetricsWriter:
    """Appends one JSON object per `write` to `<run_dir>/metrics.jsonl`; for the main process only.

    resume_step: later steps are dropped, so that the file goes on as an uninterrupted run's. None:
    a new file; one that is there is kept as `metrics.<n>.jsonl`. OSError if that cannot be done;
    later, an OSError (full disk) is reported once and costs lines of the file, not the run.
    """

    def __init__(self, run_dir: str | Path, resume_step: int | None = None):
        self.path = Path(run_dir) / "metrics.jsonl"
        self._warned = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        if resume_step is None:
            names = (self.path.with_name(f"metrics.{n}.jsonl") for n in itertools.count(1))
            kept_as = next(name for name in names if not name.exists())
            self.path.rename(kept_as)
            logger.info("%s is a former run's: kept as %s.", self.path, kept_as.name)
        else:
            old = self.path.read_bytes()
            rows = _parse(old, self.path)
            kept = b"".join(line + b"\n" for line, row in rows if row["step"] <= resume_step)
            if kept != old:
                write_atomically(self.path, kept)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append {"step": step, **metrics}. NaN and infinities become null: JSON has neither."""
        values = {key: _plain(value) for key, value in metrics.items() if key != "step"}
        record = {"step": step, **values}
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        try:
            with open(self.path, "ab", buffering=0) as file:
                end = file.tell()
                if file.write(line) != len(line):
                    file.truncate(end)  # half a line would spoil the next one
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._warned:
                logger.warning(
                    "Cannot write %s (%s): training goes on without it.", self.path, error
                )
            self._warned = True


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value  # numpy scalars, 0-d tensors
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parse(data: bytes, path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(line, row) of each line; a last line that a kill has cut (no newline) is left out."""
    *lines, tail = data.split(b"\n")
    for number, line in enumerate([*lines, tail], start=1):
        try:
            row = json.loads(line.decode())
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


# --- curves ---------------------------------------------------------------------------------------

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
DASHES = ("-", "--", ":")  # a seventh run takes the first colour again, dashed
PANELS = {  # metric: (title, unit)
    "reward": ("Reward", "mean per completion"),
    "kl": ("KL to the reference", "nats per token"),
    "entropy": ("Entropy", "nats per token"),
    "completions/mean_length": ("Completion length", "tokens"),
    "eval_accuracy": ("Evaluation: accuracy", "share correct"),
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
    for number, (label, rows) in enumerate(runs.items()):
        _draw(axes, rows, key, number, label)
    if key == "reward" and len(runs) == 1:
        (rows,) = runs.values()
        parts = sorted(fnmatch.filter({key for row in rows for key in row}, "rewards/*/mean"))
        if len(parts) > 1:
            for number, part in enumerate(parts, start=1):
                name = part.removeprefix("rewards/").removesuffix("/mean")
                _draw(axes, rows, part, number, name, is_part=True)
            _named_lines(axes)[0].set_label("weighted sum")
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


# --- the progress line ----------------------------------------------------------------------------


def progress_line(logs: Mapping[str, Any], step: int, max_steps: int) -> str | None:
    """The log as one line, absent values left out; None if it has no metric that the line shows."""
    loops = (k for k in logs if k.startswith(("eval_", "train_")) and k.endswith("_runtime"))
    is_eval = any(key.startswith("eval_") for key in logs)
    # "eval_<name>_" where there are several evaluation sets; metrics of ours still say "eval_"
    prefix = next(loops, "eval_runtime" if is_eval else "").removesuffix("runtime")

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
    return "  ".join([f"{what} {step:>{len(str(max_steps))}}/{max_steps}", *shown])


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
                disable=None,
            )
        self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        line = progress_line(logs or {}, state.global_step, state.max_steps)
        if line is None:
            super().on_log(args, state, control, logs=logs, **kwargs)
        else:
            tqdm.write(line)
