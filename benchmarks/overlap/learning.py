"""The quickstart sampled ahead: accuracy by step and by second, for each bound and seed.

    python -m benchmarks.overlap.learning --bounds 0 1 4 --seeds 0 1 2 [--json FILE]

Warm start, words and settings are the quickstart's. A vLLM server on loopback samples, on one
core, and the trainer has the other. A row has the mean reward of every logged step, the share of
words spelled right, with the seconds since the first step began, and the accuracy on held-out
words.
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

from benchmarks.common.harness import environment
from benchmarks.staleness.run import _prepare as prepare
from rloo_fast.cli import quickstart

from . import served

LONGEST = 64  # tokens that the quickstart's model takes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.overlap.learning")
    parser.add_argument("--bounds", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rows", type=int, default=256, help="completions of a step [256]")
    parser.add_argument("--port", type=int, default=18700)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    env, rows, cores = environment(), [], sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            out = Path(folder) / str(seed)
            heldout = prepare(out, seed)
            core = cores[-1] if cores[1:] else None
            with served.server(out / "warm_start", options.port + seed, core, LONGEST) as url:
                os.sched_setaffinity(0, {cores[0]})
                _train(out / "warm up", out, url, seed, 0, 2, options.rows)  # the server compiles
                for bound in options.bounds:
                    rows.append(_measure(out, heldout, url, seed, bound, options))
                    print(json.dumps(rows[-1]), flush=True)
                os.sched_setaffinity(0, set(cores))
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps({"env": env, "rows": rows}, indent=1) + "\n")
    return 0


def _measure(
    out: Path, heldout: Any, url: str, seed: int, bound: int, options: argparse.Namespace
) -> dict[str, Any]:
    from rloo_fast.reports.metrics_file import read_metrics

    run = out / f"bound {bound}"
    _train(run, out, url, seed, bound, options.steps, options.rows)
    logs = [row for row in read_metrics(run) if "reward" in row]
    seconds, every = 0.0, []
    for row in logs:
        seconds += 2 * row["step_time"]
        every.append([row["step"], round(seconds, 1), round(row["reward"], 4)])
    found = quickstart.measure(run, heldout, seed)
    return {
        "bound": bound,
        "seed": seed,
        "accuracy": {"sampled": found["sampled"], "greedy": found["greedy"]},
        "step_s": round(median(row["step_time"] for row in logs), 3),
        "step, seconds, reward": every,
    }


def _train(
    run: Path, out: Path, url: str, seed: int, bound: int, num_steps: int, num_rows: int
) -> None:
    from rloo_fast.cli.train_command import main as train

    command = ["--config", "quickstart", "--model_name_or_path", str(out / "warm_start")]
    command += ["--dataset_name", str(out / "train.jsonl"), "--output_dir", str(run)]
    command += ["--seed", str(seed), "--max_steps", str(num_steps), "--eval_strategy", "no"]
    command += ["--eval_on_start", "False", "--save_strategy", "no"]
    command += ["--per_device_train_batch_size", str(num_rows)]
    command += ["--use_vllm", "True", "--vllm_mode", "server", "--vllm_server_base_url", url]
    command += ["--max_staleness", str(bound), "--logging_steps", "2"]
    train(command)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| N | held-out accuracy, sampled | of each seed | s/step | seconds to reward 0.9 |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for bound in sorted({row["bound"] for row in rows}):
        some = [row for row in rows if row["bound"] == bound]
        accuracy = fmean(row["accuracy"]["sampled"] for row in some)
        step_s = fmean(row["step_s"] for row in some)
        reached = [_seconds_to(row, 0.9) for row in some]
        known = [x for x in reached if x is not None]
        when = f"{fmean(known):.0f}" if len(known) == len(reached) else "not in all"
        each = ", ".join(f"{row['accuracy']['sampled']:.3f}" for row in some)
        lines.append(f"| {bound} | {accuracy:.3f} | {each} | {step_s:.2f} | {when} |")
    return "\n".join(lines)


def _seconds_to(row: dict[str, Any], reward: float) -> float | None:
    return next((s for _, s, found in row["step, seconds, reward"] if found >= reward), None)


if __name__ == "__main__":
    raise SystemExit(main())
