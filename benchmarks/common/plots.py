"""Plots of benchmark JSON for the pages.

    python -m benchmarks.common.plots benchmarks/results/loss.json benchmarks/results/loss.png

One row of panels per benchmark and dtype: time, and extra memory, as multiples of eager's; shapes
along the x axis, one bar per provider. A provider without a figure has no bar; the JSON says why.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.harness import Row, comparisons, ratio, read_json

# Okabe and Ito's palette: told apart with every common form of colour blindness.
COLOURS = {
    "ours": "#D55E00",
    "ours_logprob": "#E69F00",
    "eager": "#000000",
    "compile": "#999999",
    "trl": "#0072B2",
    "trl_fused": "#004466",
    "liger": "#009E73",
    "liger_grpo": "#8FD3BE",
    "torch": "#B59A00",
    "cce": "#CC79A7",
    "cce_exact": "#EBC9DC",
    "quack": "#56B4E9",
}
FIGURES = {"seconds_median": "time / eager", "peak_extra_mem_mib": "extra memory / eager"}


def plot_rows(env: Mapping[str, object], rows: Iterable[Row], path: str | Path) -> None:
    """Write the PNG; raises ValueError if no row has a figure to plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = list(rows)
    panels: dict[tuple[str, str], list[list[Row]]] = {}
    for group in comparisons(rows):
        if any(row.skipped is None for row in group):
            panels.setdefault((group[0].benchmark, group[0].dtype), []).append(group)
    if not panels:
        raise ValueError("no row has a figure to plot: every provider was skipped.")
    widest = max(sum(len(group) + 1 for group in groups) for groups in panels.values())
    size = (2 * max(4.0, 0.42 * widest), 3.1 * len(panels) + 0.6)
    figure, axes = plt.subplots(len(panels), 2, figsize=size, squeeze=False)
    for line, ((benchmark, dtype), groups) in zip(axes, panels.items(), strict=True):
        for ax, (figure_name, label) in zip(line, FIGURES.items(), strict=True):
            _bars(ax, groups, figure_name)
            ax.set_ylabel(label)
            ax.set_title(f"{benchmark}, {dtype}", fontsize=10, loc="left")
    handles: dict[str, Any] = {}
    for ax in axes.flat:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="lower center", ncols=len(handles), frameon=False)
    figure.suptitle(_machine(env, rows[0].device), fontsize=11)
    figure.tight_layout(rect=(0, 0.3 / size[1], 1, 1 - 0.15 / size[1]))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _bars(ax, groups: list[list[Row]], figure_name: str) -> None:
    x, ticks, labelled = 0.0, [], set()
    for group in groups:
        start = x
        for row in group:
            value = ratio(row, group, figure_name)
            if value is None:
                continue
            label = row.provider if row.provider not in labelled else None
            labelled.add(row.provider)
            ax.bar(x, value, 0.9, color=COLOURS.get(row.provider, "#666666"), label=label)
            ax.annotate(
                f"{value:.2f}", (x, value), (0, 2), textcoords="offset points", ha="center", size=7
            )
            x += 1
        if x > start:
            shape = group[0].shape.replace(" D=", "\nD=")
            ticks.append(((start + x - 1) / 2, shape))
        x += 1
    ax.axhline(1.0, color="#000000", linewidth=0.8, linestyle=":")
    ax.set_xticks([t for t, _ in ticks], [s for _, s in ticks], fontsize=8)
    ax.margins(y=0.12)
    ax.spines[["top", "right"]].set_visible(False)
    if not ticks:
        ax.text(0.5, 0.5, "not measured", ha="center", transform=ax.transAxes)


def _machine(env: Mapping[str, object], device: str) -> str:
    where = env["gpu"] if device == "cuda" else f"{env['cpu']}, {env['threads']} thread(s)"
    return f"{where}, torch {env['torch']}, commit {str(env['commit'])[:8]}: lower is better"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.common.plots")
    parser.add_argument("json")
    parser.add_argument("png")
    args = parser.parse_args(argv)
    env, rows = read_json(args.json)
    plot_rows(env, rows, args.png)


if __name__ == "__main__":
    main()
