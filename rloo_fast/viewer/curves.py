"""Curves of a run for the page: columns of its metrics, of no more points than a screen shows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ..reports.curves import X_AXES, place_rows
from ..reports.panels import Rows, is_value

MAX_POINTS = 1000  # of a curve; two per bucket, its least and its largest value
DIGITS = 6  # that a number keeps


def curves(rows: Rows, max_points: int = MAX_POINTS) -> dict[str, Any]:
    """x axis -> the place of each log on it; metric -> numbers of its logs, and their values."""
    places = {}
    for axis in X_AXES:
        placed = [dict(row) for row in rows]
        place_rows(placed, axis)
        places[axis] = [rounded(row["x"]) for row in placed]
    columns: dict[str, tuple[list[int], list[float]]] = {}
    for number, row in enumerate(rows):
        for key, value in row.items():
            if key != "step" and is_value(value):
                at, values = columns.setdefault(key, ([], []))
                at.append(number)
                values.append(value)
    series = {}
    for key, (at, values) in columns.items():
        kept = thinned(values, max_points)
        series[key] = [[at[i] for i in kept], [rounded(values[i]) for i in kept]]
    return {"x": places, "series": series}


def thinned(values: Sequence[float], max_points: int) -> list[int]:
    """Places of at most `max_points` values that look alike: of each stretch the least and the
    largest, and the first and last of all. Spikes stay."""
    number = len(values)
    if number <= max_points:
        return list(range(number))
    array = np.asarray(values, dtype=float)
    bounds = np.linspace(0, number, (max_points - 2) // 2 + 1).astype(int)
    kept = {0, number - 1}
    for start, end in pairwise(bounds):
        part = array[start:end]
        kept |= {int(start + part.argmin()), int(start + part.argmax())}
    return sorted(kept)


def rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
