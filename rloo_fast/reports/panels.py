"""What curves show: which panels there are, how values are smoothed, and where their axes end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .metric_names import is_user_metric

SMOOTHED_FROM = 31  # logs; fewer are drawn as they are
LEAST_SHARE = 0.1  # of the largest value: less than that is not spread over a whole axis
FAR_OUT = 2.0  # times the range of the running median: a spike beyond is marked at the edge
MAX_USER_PANELS = 6
PARTS = "rewards/*/mean"  # of the reward, by function

Rows = list[dict[str, Any]]  # of one run's metrics.jsonl; its place on the x axis under "x"


class Kind(NamedTuple):
    """What a metric is called, and its axis.

    least_span: the axis covers at least as much. bounds: it goes no further. from_zero: it begins
    at 0 unless there is less.
    """

    title: str
    unit: str = ""
    least_span: float = 0.0
    bounds: tuple[float, float] = (-math.inf, math.inf)
    from_zero: bool = False


def _share(title: str, unit: str) -> Kind:
    return Kind(title, unit, LEAST_SHARE, (0.0, 1.0))


LEARNING = {
    "reward": Kind("Reward", "mean per completion"),
    "accuracy": _share("Accuracy", "share correct"),
}
RUN = {
    "kl": Kind("KL to the reference", "nats per token", 1e-3, from_zero=True),
    "entropy": Kind("Entropy", "nats per token", 0.05, from_zero=True),
    "completions/mean_length": Kind("Completion length", "tokens", 2.0),
    "completions/clipped_ratio": _share("Cut at the length limit", "share of completions"),
    "clip_ratio/region_mean": _share("Importance ratios clipped", "share of ratios"),
    "loss": Kind("Loss", "of an optimizer step", 1e-3),
    "grad_norm": Kind("Gradient norm", "before clipping", from_zero=True),
    "learning_rate": Kind("Learning rate", "", from_zero=True),
    "throughput/completion_tokens_per_s": Kind("Speed", "completion tokens/s", from_zero=True),
}
ONLY_IF_NOT_ZERO = ("clip_ratio/region_mean",)  # on-policy, there is nothing to clip


class Panel(NamedTuple):
    """One metric, and what is drawn beside it: label -> metric."""

    key: str
    kind: Kind
    beside: dict[str, str]


def present(rows: Rows) -> set[str]:
    """The metrics with a value somewhere."""
    return {key for row in rows for key in row if is_value(row[key])} - {"step", "x"}


def is_value(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def choose_panels(rows: Rows, is_alone: bool) -> tuple[list[Panel], list[str]]:
    """(panels of what was logged, the user's metrics that they leave out).

    An evaluation's values are drawn beside training's where a run is alone, else in a panel of
    their own, and those of `RUN` not at all.
    """
    logged = present(rows)
    prefixes = eval_prefixes(logged)
    bare = {key: _without_prefix(key, prefixes)[1] for key in logged}
    users = sorted({name for name in bare.values() if is_user_metric(name)} - LEARNING.keys())
    shown = [*LEARNING, *users[:MAX_USER_PANELS], *RUN]
    panels = []
    for name in shown:
        keys = [key for key in (name, *(p + name for p in reversed(prefixes))) if key in logged]
        if name in ONLY_IF_NOT_ZERO and not any(row.get(key) for row in rows for key in keys):
            continue
        if not is_alone and name in RUN:  # a panel for each would be more than anybody looks at
            keys = [key for key in keys if key == name]
        if is_alone and keys:
            beside = {_label(key, prefixes): key for key in keys if key != name}
            panels.append(Panel(name, kind_of(name, []), beside))
        else:
            panels += [panel_of(key, logged) for key in keys]
    return panels, users[MAX_USER_PANELS:]


def panel_of(key: str, logged: set[str]) -> Panel:
    """A panel of this metric alone."""
    return Panel(key, kind_of(key, eval_prefixes(logged)), {})


def eval_prefixes(logged: Iterable[str]) -> list[str]:
    """eval_, and those of evaluations by another name, whose time carries it: eval_<name>_."""
    timed = {key.removesuffix("runtime") for key in logged if key.endswith("_runtime")}
    return sorted({"eval_", *timed} - {"train_"}, key=len, reverse=True)


def kind_of(key: str, prefixes: Sequence[str]) -> Kind:
    prefix, name = _without_prefix(key, prefixes)
    kind = {**LEARNING, **RUN}.get(name, Kind(name))
    return kind._replace(title=f"{kind.title}, {_label(key, prefixes)}") if prefix else kind


def _label(key: str, prefixes: Sequence[str]) -> str:
    name = _without_prefix(key, prefixes)[0].removeprefix("eval").strip("_")
    return f"evaluation on {name}" if name else "evaluation"


def _without_prefix(key: str, prefixes: Sequence[str]) -> tuple[str, str]:
    prefix = next((p for p in prefixes if key.startswith(p)), "")
    return prefix, key.removeprefix(prefix)


# Values


class Curve(NamedTuple):
    """A metric of one run; NaN where it was logged and not finite."""

    places: np.ndarray
    values: np.ndarray
    smooth: np.ndarray  # their running mean, spikes cut to `usual_range`; few logs are their own

    @property
    def is_smoothed(self) -> bool:
        return self.smooth is not self.values


def curve(rows: Rows, key: str) -> Curve:
    rows = [row for row in rows if key in row]
    places = np.array([row["x"] for row in rows], dtype=float)
    values = [row[key] if is_value(row[key]) else math.nan for row in rows]
    values = np.array(values, dtype=float)
    number = len(values)
    if number < SMOOTHED_FROM:
        return Curve(places, values, values)
    # a fifteenth of a short run; of a long one a thirtieth, a stroke's width or two in the picture
    window = max(min(number // 15, 30), number // 30)
    cut = np.clip(values, *usual_range(values))
    return Curve(places, values, running_mean(cut, window))


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """y_i = mean of the finite values within h = window // 2 places of i, of those there are; at
    the start within max(i, h // 8), so that the line begins where the run does. NaN stays NaN."""
    number, half = len(values), window // 2
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(number)
    reach = np.minimum(half, np.maximum(index, half // 8))
    first, end = np.maximum(index - reach, 0), np.minimum(index + reach + 1, number)
    total, count = sums[end] - sums[first], counts[end] - counts[first]
    return np.where(finite, total / np.maximum(count, 1), math.nan)


def axis_limits(curves: Sequence[Curve], kind: Kind) -> tuple[float, float]:
    """Where the y axis begins and ends: at the values, but for single spikes that are far out, and
    never closer together than what `Kind` and `LEAST_SHARE` say. Equal for equal values."""
    low, high = _range(curves)
    span = max(kind.least_span, LEAST_SHARE * max(abs(low), abs(high)))
    if kind.from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if (missing := span - (high - low)) > 0:
        low, high = low - (0 if kind.from_zero else missing / 2), high + missing / 2
        if kind.from_zero:
            high += missing / 2
    least, most = kind.bounds
    if low < least:
        low, high = least, min(high + least - low, most)
    if high > most:
        low, high = max(low + most - high, least), most
    span = (high - low) or 1.0
    return low - (0.02 if kind.from_zero and low == 0 else 0.05) * span, high + 0.05 * span


def _range(curves: Sequence[Curve]) -> tuple[float, float]:
    ranges = []
    for line in curves:
        every = np.nanmin(line.values), np.nanmax(line.values)
        ranges.append(usual_range(line.values) if line.is_smoothed else every)
    return float(min(low for low, _ in ranges)), float(max(high for _, high in ranges))


def usual_range(values: np.ndarray) -> tuple[float, float]:
    """(least, largest) of the finite values, but for those that are farther from the running
    median's range than FAR_OUT times that range."""
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    # of five; the first and last value stand for what is missing beside them
    padded = np.pad(values, 2, mode="edge")
    median = np.median(np.lib.stride_tricks.sliding_window_view(padded, 5), axis=1)
    low, high = median.min(), median.max()
    reach = FAR_OUT * max(high - low, LEAST_SHARE * max(abs(low), abs(high)))
    kept = values[(values >= low - reach) & (values <= high + reach)]
    return float(kept.min()), float(kept.max())
