"""Panels of curves with matplotlib; no global state of it is used."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .panels import PARTS, SMOOTHED_FROM, Curve, Kind, Panel, Rows, axis_limits, curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
DASHES = ("-", "--", ":")  # a seventh run takes the first colour again, dashed
LEGEND_FONT = 8


def draw_panel(axes: Axes, runs: Mapping[str, Sequence[Rows]], panel: Panel) -> None:
    """All runs, what belongs beside a single one, and the limits of y."""
    drawn = []
    is_alone = sum(len(group) for group in runs.values()) == 1
    for number, (label, group) in enumerate(runs.items()):
        if len(group) > 1:
            drawn += _draw_group(axes, group, panel.key, number, label)
        else:
            name = "training" if panel.beside else "run" if is_alone else label
            drawn += _draw(axes, group[0], panel.key, number, name)
    if is_alone:
        ((rows,),) = runs.values()
        for number, (name, key) in enumerate(panel.beside.items(), start=1):
            drawn += _draw(axes, rows, key, number, name)
        if panel.key == "reward":
            drawn += _draw_parts(axes, rows, first=1 + len(panel.beside))
    low, high = axis_limits(drawn, panel.kind)
    axes.set_ylim(low, high)
    _mark_gaps(axes, drawn)
    _mark_spikes(axes, drawn, low, high)


def _draw(axes: Axes, rows: Rows, key: str, number: int, label: str) -> list[Curve]:
    """The curve, where it has a value."""
    line = curve(rows, key)
    if not np.isfinite(line.values).any():
        return []
    style = _style(number)
    if line.is_smoothed:
        alpha = 0.3 if len(line.values) < 1000 else 0.2
        axes.plot(line.places, line.values, color=style["color"], alpha=alpha, linewidth=0.7)
    axes.plot(line.places, line.smooth, **style, linewidth=1.8, label=label)
    finite = np.isfinite(line.smooth)
    alone = finite & ~np.roll(finite, 1) & ~np.roll(finite, -1)  # between gaps: no line shows it
    dots = alone if line.is_smoothed else finite
    if dots.any():
        axes.plot(line.places[dots], line.smooth[dots], "o", color=style["color"], markersize=3)
    return [line]


def _draw_parts(axes: Axes, rows: Rows, first: int) -> list[Curve]:
    """What the reward is the weighted sum of, where that is several functions."""
    parts = sorted(fnmatch.filter({key for row in rows for key in row}, PARTS))
    drawn = []
    if len(parts) < 2:
        return drawn
    for number, part in enumerate(parts, start=first):
        line = curve(rows, part)
        if np.isfinite(line.values).any():
            name = part.removeprefix("rewards/").removesuffix("/mean")
            axes.plot(line.places, line.smooth, **_style(number), linewidth=1.1, label=name)
            drawn.append(line)
    handles, names = axes.get_legend_handles_labels()
    names[0] = "weighted sum"
    axes.legend(handles, names, frameon=False, fontsize=7, ncols=1 if len(names) < 5 else 2)
    return drawn


def _draw_group(
    axes: Axes, group: Sequence[Rows], key: str, number: int, label: str
) -> list[Curve]:
    """One line of several runs: their mean, in a band from the least to the largest."""
    curves = []
    for line in (curve(rows, key) for rows in group):
        finite = np.isfinite(line.smooth)
        if finite.any():
            curves.append((line.places[finite], line.smooth[finite]))
    if not curves:
        return []
    first = max(places[0] for places, _ in curves)
    last = min(places[-1] for places, _ in curves)
    every = np.unique(np.concatenate([places for places, _ in curves]))
    grid = every[(every >= first) & (every <= last)]
    if not len(grid):  # they have no place in common
        return []
    values = np.stack([np.interp(grid, places, smooth) for places, smooth in curves])
    style = _style(number)
    low, high, mean = values.min(axis=0), values.max(axis=0), values.mean(axis=0)
    axes.fill_between(grid, low, high, color=style["color"], alpha=0.18, linewidth=0)
    axes.plot(grid, mean, **style, linewidth=2.0, label=f"{label} (mean of {len(curves)} runs)")
    return [Curve(grid, edge, edge) for edge in (low, high)]


def _style(number: int) -> dict[str, Any]:
    """Colour and dashes of a panel's line with this number."""
    dashes = DASHES[number // len(COLORS) % len(DASHES)]
    return {"color": COLORS[number % len(COLORS)], "linestyle": dashes}


def _mark_gaps(axes: Axes, drawn: Sequence[Curve]) -> None:
    """A cross at the bottom where a value was not finite."""
    gaps = np.unique(np.concatenate([line.places[np.isnan(line.values)] for line in drawn] or [[]]))
    if len(gaps):
        transform = axes.get_xaxis_transform()  # y in shares of the axis
        axes.plot(gaps, np.full(len(gaps), 0.03), "x", color="0.45", markersize=4, clip_on=False,
                  transform=transform, gid="gaps")  # fmt: skip


def _mark_spikes(axes: Axes, drawn: Sequence[Curve], low: float, high: float) -> None:
    """A triangle at the edge where a value lies beyond it, and what the farthest one is."""
    for line, is_above in ((line, above) for line in drawn for above in (True, False)):
        beyond = line.values > high if is_above else line.values < low
        if not beyond.any():
            continue
        edge = high if is_above else low
        middle = sum(axes.get_xlim()) / 2
        places, values = line.places[beyond], line.values[beyond]
        axes.plot(places, np.full(len(places), edge), "^" if is_above else "v", color="0.3",
                  markersize=4, clip_on=False, gid="spikes")  # fmt: skip
        farthest = values.argmax() if is_above else values.argmin()
        is_left = places[farthest] < middle
        axes.annotate(
            f"{values[farthest]:.3g}",
            (places[farthest], edge),
            xytext=(4 if is_left else -4, -2 if is_above else 2),
            ha="left" if is_left else "right",
            textcoords="offset points",
            va="top" if is_above else "bottom",
            fontsize=7,
            color="0.3",
        )


def add_legend(figure: Figure, is_alone: bool, left_out: Sequence[str]) -> None:
    """Below the panels: one entry per label, what faint lines, bands and marks are."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: dict[str, Any] = {}
    for axes in figure.axes:
        if axes.get_legend() is None:
            handles, labels = axes.get_legend_handles_labels()
            entries |= dict(zip(labels, handles, strict=True))
    if is_alone:
        entries.pop("run", None)
        entries = dict(sorted(entries.items(), key=lambda entry: entry[0] != "training"))
    lines = [line for axes in figure.axes for line in axes.lines]
    if any(np.size(line.get_xdata()) >= SMOOTHED_FROM and line.get_alpha() for line in lines):
        entries["faint: as logged, bold: running mean"] = Line2D([], [], color="0.6", linewidth=0.7)
    if any(axes.collections for axes in figure.axes):
        entries["band: least to largest"] = Patch(color="0.85")
    marks = {line.get_gid(): line for line in lines}
    for gid, name in (("gaps", "NaN or infinite"), ("spikes", "beyond the axis")):
        if gid in marks:
            entries[name] = marks[gid]
    if left_out:
        more = f"not shown, see --keys: {', '.join(left_out[:4])}" + ", …" * (len(left_out) > 4)
        entries[more] = Line2D([], [], linestyle="none")
    if entries:
        figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside lower center",
            ncols=4,
            frameon=False,
            fontsize=LEGEND_FONT,
        )


def dress(axes: Axes, kind: Kind, x_label: str) -> None:
    """Titles, ticks and grid; without an `x_label` the panel below shows the numbers of x."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

    axes.set_title(kind.title, fontsize=10, loc="left", fontweight="bold")
    axes.set_ylabel(kind.unit, fontsize=8)
    axes.set_xlabel(x_label, fontsize=8)
    axes.tick_params(labelsize=8, length=3, color="0.6", labelbottom=bool(x_label))
    is_time = "time" in x_label
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=not is_time))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    if "tokens" in x_label:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.6")


def _tick(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.4g}"
