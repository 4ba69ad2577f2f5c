"""The quickstart's model, trained on completions that lag behind: accuracy for each loss and lag.

python -m benchmarks.staleness [--lags 0 1 4 16] [--losses ...] [--seeds 0 1 2] [--json FILE]

At lag n every completion is sampled by the weights of n optimizer steps ago. Everything else is
the quickstart's: model, words, settings; `--rows` completions a step, eight of each word.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common.harness import environment
from rloo_fast.cli import quickstart

from .lagged import Lagged

# name -> options of the train command; what each is: rloo_fast/objective/importance.py
LOSSES: dict[str, list[str]] = {
    "ratio per completion": [],
    "ratio per token": ["--loss", "reinforce_pp"],
    "weight per completion": ["--truncated_importance_sampling", "sequence"],
    "weight per token": ["--truncated_importance_sampling", "token"],
    "as if fresh": ["--logp_diff_stop", "0", "--logp_diff_warn", "0"],
}
LOGGED = ("sampling/ess", "sampling/frac_clipped", "clip_ratio/region_mean", "grad_norm")


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    quickstart._no_progress_bars()
    env, rows = environment(), []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            out = (options.output_dir or Path(folder)) / str(seed)
            heldout = _prepare(out, seed)
            for lag in options.lags:
                for loss in options.losses if lag else options.losses[:1]:
                    row = _measure(out, heldout, options, seed=seed, lag=lag, loss=loss)
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                    if options.json is not None:
                        options.json.write_text(json.dumps({"env": env, "rows": rows}, indent=1))
    print(table(rows))
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.staleness")
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 4, 16])
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=[*LOSSES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rows", type=int, default=256, help="completions of a step [256]")
    parser.add_argument("--learning_rate", type=float, help="in place of the quickstart's")
    parser.add_argument("--output_dir", type=Path, help="where warm starts are kept and found")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def _prepare(out: Path, seed: int) -> Any:
    """The quickstart's words and warm start in `out`; returns the held-out words."""
    from rloo_fast.cli.warm_start import (
        build_model,
        build_tokenizer,
        make_demonstrations,
        warm_start,
    )

    heldout, train, demonstrated = quickstart.make_problems(seed)
    if (out / "warm_start" / "config.json").is_file():
        return heldout
    out.mkdir(parents=True, exist_ok=True)
    train.to_json(out / "train.jsonl")
    tokenizer = build_tokenizer(demonstrated)
    warm_start(
        build_model(tokenizer, seed),
        tokenizer,
        make_demonstrations(demonstrated, seed),
        out / "warm_start",
        max_steps=quickstart.WARM_START_STEPS,
        seed=seed,
    )
    return heldout


def _measure(
    out: Path, heldout: Any, options: argparse.Namespace, *, seed: int, lag: int, loss: str
) -> dict[str, Any]:
    from rloo_fast.cli.train_command import main as train
    from rloo_fast.reports.metrics_file import read_metrics

    Lagged.lag, Lagged.tells = lag, loss != "as if fresh"
    run = out / f"{lag} {loss}"
    command = ["--config", "quickstart", "--model_name_or_path", str(out / "warm_start")]
    command += ["--dataset_name", str(out / "train.jsonl"), "--output_dir", str(run)]
    command += ["--seed", str(seed), "--max_steps", str(options.steps), "--eval_strategy", "no"]
    command += ["--eval_on_start", "False", "--save_strategy", "no"]
    command += ["--per_device_train_batch_size", str(options.rows)]
    command += ["--rollout_engine", "lagged", *LOSSES[loss]]
    if options.learning_rate is not None:
        command += ["--learning_rate", str(options.learning_rate)]
    start = time.perf_counter()
    train(command)
    seconds = time.perf_counter() - start
    logs = [row for row in read_metrics(run) if "reward" in row]
    found = quickstart.measure(run, heldout, seed)
    return {
        "lag": lag,
        "loss": loss,
        "seed": seed,
        "accuracy": {"sampled": found["sampled"], "greedy": found["greedy"]},
        "reward": [round(row["reward"], 4) for row in logs],
        "seconds": round(seconds, 1),
        **{
            name: round(fmean(values), 4)
            for name in LOGGED
            if (values := [row[name] for row in logs if name in row])
        },
        "grad_norm_max": round(max(row["grad_norm"] for row in logs), 2),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracy on held-out words, sampled: mean over the seeds, and their range."""
    lags = sorted({row["lag"] for row in rows})
    lines = [f"{'loss':22}" + "".join(f"{f'lag {lag}':>22}" for lag in lags)]
    for loss in dict.fromkeys(row["loss"] for row in rows):
        cells = ""
        for lag in lags:
            found = [
                row["accuracy"]["sampled"]
                for row in rows
                if row["loss"] == loss and row["lag"] == lag
            ]
            cell = f"{fmean(found):.3f} ({min(found):.3f}-{max(found):.3f})" if found else ""
            cells += f"{cell:>22}"
        lines.append(f"{loss:22}{cells}")
    return "\n".join(lines)
