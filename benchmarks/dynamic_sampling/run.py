"""Prompts sampled per prompt trained, for a known chance p that a group has signal: 1/p at best.

python -m benchmarks.dynamic_sampling [--p 0.1 0.3 0.7] [--prompts 16 64] [--groups 64000]

The source of generation batches is the trainer's own; completions and rewards are scripted, and p
stays as it is. `waiting`: groups that are kept for the next batch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import TrainerState

from benchmarks.common.harness import environment
from rloo_fast.data.seeds import step_seed

from .scripted import scripted_source


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.dynamic_sampling")
    parser.add_argument("--p", type=float, nargs="+", default=[0.1, 0.3, 0.7])
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--groups", type=int, default=64_000, help="trained, in all")
    parser.add_argument("--max-rounds", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    rows = [
        measure(p, size, options.groups // size, options.max_rounds)
        for p in options.p
        for size in options.prompts
    ]
    if options.json is not None:
        options.json.write_text(json.dumps({"env": environment(), "rows": rows}, indent=1))
    print(table(rows))
    return 0


def measure(p: float, prompts_per_batch: int, num_batches: int, max_rounds: int) -> dict[str, Any]:
    source = scripted_source(p, prompts_per_batch=prompts_per_batch, max_rounds=max_rounds)
    state, logs = TrainerState(), []
    for number in range(num_batches):
        logs.append(source.next([], step_seed(7, number), state).logged)
    per_used = fmean(log["dynamic/generated_per_used"] for log in logs)
    return {
        "p": p,
        "prompts_per_batch": prompts_per_batch,
        "batches": num_batches,
        "acceptance": fmean(log["dynamic/acceptance"] for log in logs),
        "generated_per_used": per_used,
        "times_p": per_used * p,
        "rounds": fmean(log["dynamic/rounds"] for log in logs),
        "rounds_max": max(log["dynamic/rounds"] for log in logs),
        "waiting": fmean(log["dynamic/waiting"] for log in logs),
        "waiting_max": max(log["dynamic/waiting"] for log in logs),
        "without_signal": fmean(log["dynamic/without_signal"] for log in logs),
    }


def table(rows: list[dict[str, Any]]) -> str:
    head = ("p", "prompts of a batch", "batches", "generated / used", "x p", "rounds", "at most",
            "waiting", "at most")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for row in rows:
        cells = (
            f"{row['p']}", f"{row['prompts_per_batch']}", f"{row['batches']}",
            f"{row['generated_per_used']:.3f}", f"{row['times_p']:.4f}", f"{row['rounds']:.2f}",
            f"{row['rounds_max']:.0f}", f"{row['waiting']:.2f}", f"{row['waiting_max']:.0f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
