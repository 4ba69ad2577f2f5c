"""(g) The quickstart's run, its engine asleep while it trains; killed, and resumed.

The first process is killed once it has written a checkpoint and gone on; the second resumes.
Without vLLM the completions are sampled by transformers, and there is nothing to sleep.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from rloo_fast.cli import quickstart, warm_start
from rloo_fast.reports.metrics_file import read_metrics

from .part import Smoke

LONGEST_S = 130.0  # for one of the two runs


class Sizes(NamedTuple):
    warm_start_steps: int
    steps: int
    save_steps: int
    rows: int  # completions per step


SIZES = {False: Sizes(300, 60, 10, 256), True: Sizes(2, 8, 2, 16)}  # by dry


def run(smoke: Smoke) -> None:
    sizes, folder = SIZES[smoke.dry], smoke.folder
    _, train, demonstrated = quickstart.make_problems(0)
    train.to_json(folder / "train.jsonl")
    tokenizer = warm_start.build_tokenizer(demonstrated)
    model = warm_start.build_model(tokenizer, 0)
    shown = warm_start.make_demonstrations(demonstrated, 0)
    warm_start.warm_start(
        model, tokenizer, shown, folder / "warm_start", max_steps=sizes.warm_start_steps
    )
    out = folder / "run"
    command = [sys.executable, "-m", "rloo_fast", "train", *_options(smoke, sizes)]
    smoke.record(engine=smoke.engine)
    _killed_after(out / f"checkpoint-{sizes.save_steps}", command)
    killed_at = _steps(out)
    smoke.record(killed_at_step=max(killed_at, default=0))
    subprocess.run([*command, "--resume_from_checkpoint", "True"], check=True, timeout=LONGEST_S)
    _record(smoke, sizes, out)


def _options(smoke: Smoke, sizes: Sizes) -> list[str]:
    options: dict[str, Any] = {
        "config": "quickstart",
        "model_name_or_path": smoke.folder / "warm_start",
        "dataset_name": smoke.folder / "train.jsonl",
        "output_dir": smoke.folder / "run",
        "use_cpu": smoke.dry,
        "max_steps": sizes.steps,
        "save_steps": sizes.save_steps,
        "save_total_limit": 10,
        "per_device_train_batch_size": sizes.rows,
        "logging_steps": 1,
        "eval_strategy": "no",
        "eval_on_start": False,
    }
    if smoke.engine == "vllm":
        options |= {"use_vllm": True, "vllm_enable_sleep_mode": True}
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def _killed_after(checkpoint: Path, command: list[str]) -> None:
    """Run the command, and kill it once it has logged a step after that of the checkpoint."""
    process = subprocess.Popen(command)
    due = time.monotonic() + LONGEST_S
    try:
        while process.poll() is None and time.monotonic() < due:
            saved = int(checkpoint.name.partition("-")[2])
            if checkpoint.exists() and max(_steps(checkpoint.parent), default=0) > saved:
                return
            time.sleep(0.02)
        raise RuntimeError(f"the first run ended ({process.poll()}) before it could be killed")
    finally:
        process.kill()
        process.wait()


def _steps(out: Path) -> list[int]:
    """Those whose metrics are written."""
    if not (out / "metrics.jsonl").exists():
        return []
    return [row["step"] for row in read_metrics(out) if "reward" in row]


def _record(smoke: Smoke, sizes: Sizes, out: Path) -> None:
    rows = [row for row in read_metrics(out) if "reward" in row]
    logged = [row["step"] for row in rows]
    saved = [int(path.name.partition("-")[2]) for path in out.glob("checkpoint-*")]
    rewards = [row["reward"] for row in rows]
    smoke.record(
        last_step=max(logged),
        steps_missing=sum(logged.count(step) != 1 for step in range(1, sizes.steps + 1)),
        checkpoints=", ".join(map(str, sorted(saved))),
        largest_logp_diff=max(row["sampling/logp_diff_mean"] for row in rows),
        reward_first=sum(rewards[:5]) / len(rewards[:5]),
        reward_last=sum(rewards[-5:]) / len(rewards[-5:]),
    )
