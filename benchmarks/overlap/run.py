"""Step time with completions sampled ahead (max_staleness), beside max(generate, train).

    python -m benchmarks.overlap [--steps 6] [--json FILE]
    python -m benchmarks.overlap --served [--port 18500] [--json FILE]

scripted: an engine and an update that sleep for stated times, so that the trainer's own time and
what it fails to overlap is all that is left; lengths are long-tailed. Wanted: at most 1.05 times
the longer of the two, where the synchronous run takes their sum.

served: a real vLLM server on loopback with a tiny model, one core for it and one for the trainer.
What one step takes to sample and to train is measured in the synchronous run.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from benchmarks.common.harness import environment

from . import scripted, served

TIMES = ((4.0, 2.0), (3.0, 3.0), (2.0, 4.0))  # seconds to generate, to train
BOUNDS = (0, 1, 4)


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    torch.set_num_threads(1)
    env, rows = environment(), []
    with tempfile.TemporaryDirectory() as folder:
        measure = _served if options.served else _scripted
        for row in measure(Path(folder), options):
            rows.append(row)
            print(json.dumps(row), flush=True)
    print(table(rows))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"env": env, "rows": rows}, indent=1) + "\n")
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.overlap")
    parser.add_argument("--served", action="store_true", help="with a real server")
    parser.add_argument("--port", type=int, default=18500)
    parser.add_argument("--steps", type=int, default=6, help="that are timed [6]")
    parser.add_argument("--bounds", type=int, nargs="+", default=list(BOUNDS))
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def _scripted(folder: Path, options: argparse.Namespace) -> Any:
    for generate_s, train_s in TIMES:
        for bound in options.bounds:
            seconds = scripted.step_seconds(folder, bound, generate_s, train_s, options.steps)
            yield _row("scripted", bound, generate_s, train_s, seconds)


def _served(folder: Path, options: argparse.Namespace) -> Any:
    cores = sorted(os.sched_getaffinity(0))
    served.save_model(folder / "model")
    with served.server(folder / "model", options.port, cores[-1] if cores[1:] else None) as url:
        os.sched_setaffinity(0, {cores[0]})
        generate_s = train_s = 0.0
        for bound in sorted({0, *options.bounds}):
            logs = served.run(folder, url, bound, options.steps)
            seconds = [row["step_time"] for row in logs]
            if bound == 0:
                generate_s = median(row["time/rollout_s"] for row in logs)
                train_s = median(row["step_time"] - row["time/rollout_s"] for row in logs)
            sync_s = median(row.get("time/weight_sync_s", 0.0) for row in logs)
            yield _row("vLLM server", bound, generate_s, train_s, seconds) | {"sync_s": sync_s}


def _row(
    engine: str, bound: int, generate_s: float, train_s: float, seconds: list[float]
) -> dict[str, Any]:
    longer = max(generate_s, train_s)
    return {
        "engine": engine,
        "max_staleness": bound,
        "generate_s": round(generate_s, 3),
        "train_s": round(train_s, 3),
        "step_s": round(fmean(seconds), 3),
        "step_s_median": round(median(seconds), 3),
        "of_sum": round(fmean(seconds) / (generate_s + train_s), 3),
        "of_max": round(fmean(seconds) / longer, 3),
        "seconds": [round(x, 3) for x in seconds],
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| engine | N | generate s | train s | step s | of the sum | of the longer |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    names = ("max_staleness", "generate_s", "train_s", "step_s", "of_sum", "of_max")
    for row in rows:
        cells = [f"{row[name]:.3g}" for name in names]
        lines.append(f"| {row['engine']} | {' | '.join(cells)} |")
    return "\n".join(lines)
