"""Everything that needs a GPU, in one command of at most nine minutes (`make gpu-check`).

    python -m benchmarks.gpu_check --out FOLDER

    share   step
     75 s   numerics   every op against float64 on the device, all dtypes, both ways to the logits
     60 s   attention  shared-prefix attention against float64 and SDPA, fp32 and bf16; twice more,
     50 s              with a window,
     50 s              and with a soft-cap, which FlexAttention computes
     65 s   logits     the logits-in ops against the measured copy bandwidth, and their peers
    105 s   linear     the fused loss at four shapes against 6NDV at the measured rate, its peers
     10 s   predicted  what the cost model says of those shapes, beside what was measured
     15 s   products   dX in parts of the vocabulary, dW added in memory, beside the library's way
     40 s   tiles      the matrix kernel's tiles against the library's product
     50 s   update     an optimizer step of the trainer, shared prefix, padded, and TRL's

520 s in all; --seconds scales the shares. A step may take its share and what those before it left;
what cannot run here is skipped at the start, and its share goes to the others. Each step is a
process; its JSON and its output go to FOLDER, and `summary.json` says which steps ran.
Needs this repository, torch >= 2.11, triton >= 3.6 and transformers >= 5.16; `update` needs what
the trainer imports besides. Peers that are not installed get a row that says so. A step that fails
does not stop the next.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOUR_SHAPES = ["pythia-410m", "pythia-1b", "qwen2.5-0.5b", "qwen2.5-7b"]
# beyond what every step needs
TRAINER_NEEDS = ("accelerate", "datasets", "pandas", "pyarrow", "rich")
NOT_STARTED = "not started"
SKIPPED = "skipped: "
LEAST_S = 10  # no process is started for less


@dataclass
class Step:
    """One process: its module's arguments, its share of the time, the packages it needs."""

    name: str
    module: str
    arguments: list[str]
    share_s: float
    needs: tuple[str, ...] = ()
    seconds: float | None = None
    outcome: str = NOT_STARTED


def steps(out: Path, device: str, small: bool) -> list[Step]:
    """All steps; `small` shrinks them so that a CPU can try the script itself."""
    on = ["--device", device]
    loss = [*on, *_loss_arguments(small)]
    two = ["256,16,503"] if small else ["pythia-410m", "qwen2.5-0.5b"]
    four = ["256,16,503"] if small else FOUR_SHAPES
    attention, window, softcap = _attention_arguments(small)
    vocab = "503" if small else "50257,50304,151936"
    found = [
        Step("numerics", "benchmarks.numerics", [*on, "--vocab", vocab], 75),
        Step("attention", "benchmarks.attention", [*on, *attention], 60),
        Step("attention_window", "benchmarks.attention", [*on, *attention, *window], 50),
        Step("attention_softcap", "benchmarks.attention", [*on, *attention, *softcap], 50),
        Step("logits", "benchmarks.loss", ["--job", "logits", *loss, *_shapes(two)], 65),
        Step("linear", "benchmarks.loss", ["--job", "linear", *loss, *_shapes(four)], 105),
    ]
    if device == "cuda":
        measured = ["--measured", str(out / "linear.json")]
        found.append(Step("predicted", "benchmarks.tuning.cost_model", measured, 10))
        products = ["--runs", "5", *_shapes(four)]
        found.append(Step("products", "benchmarks.tuning.products", products, 15))
        found.append(Step("tiles", "benchmarks.tiles", _shapes(four), 40))
    found.append(
        Step("update", "benchmarks.step", [*on, *_update_arguments(small)], 50, TRAINER_NEEDS)
    )
    for step in found:
        step.arguments += ["--json", str(out / f"{step.name}.json")]
    return found


def _shapes(names: list[str]) -> list[str]:
    return [part for name in names for part in ("--shape", name)]


def _loss_arguments(small: bool) -> list[str]:
    if small:
        return ["--dtype", "float32", "--rows", "256", "--runs", "1", "--providers", "ours,eager"]
    return ["--dtype", "bfloat16", "--rows", "16384", "--runs", "10"]


def _attention_arguments(small: bool) -> tuple[list[str], list[str], list[str]]:
    """For every run, for the one with a window, for the one with a soft-cap."""
    if small:
        sizes = ["--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--runs", "1"]
        return [*_shapes(["short"]), *sizes, "--no-memory"], ["--window", "8"], ["--softcap", "2"]
    common = [*_shapes(["tldr", "math"]), "--dtype", "bfloat16,float32", "--runs", "10"]
    # a low cap, which bends scores of size 1 by more than bf16 rounds
    return common, ["--window", "256"], ["--softcap", "2"]


def _update_arguments(small: bool) -> list[str]:
    common = ["--providers", "ours_padded,ours,trl", "--whole-step-runs", "0"]
    if small:
        return [*common, "--shape", "short", "--model", "tiny", "--runs", "1", "--no-memory"]
    return [*common, "--shape", "tldr", "--model", "pythia-410m", "--dtype", "bfloat16"]


def skip_what_cannot_run(todo: list[Step]) -> None:
    for step in todo:
        missing = [name for name in step.needs if importlib.util.find_spec(name) is None]
        if missing:
            step.outcome = f"{SKIPPED}{', '.join(missing)} not installed"


def run(step: Step, out: Path, limit: float) -> None:
    """One process of at most `limit` seconds."""
    if limit < LEAST_S:
        step.outcome = "no time left"
        return
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    start = time.monotonic()
    with (out / f"{step.name}.txt").open("w") as log:
        try:
            done = subprocess.run(
                [sys.executable, "-m", step.module, *step.arguments],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": path},
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=limit,
            )
            step.outcome = "passed" if done.returncode == 0 else f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            step.outcome = f"stopped after {limit:.0f} s; what it had written is kept"
    step.seconds = round(time.monotonic() - start, 1)


def main(argv: list[str] | None = None) -> int:
    """0 if every step that can run here passed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", default="runs/gpu-check", help="folder for the results")
    parser.add_argument("--seconds", type=float, default=520, help="for all steps together")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes: try the script itself")
    args = parser.parse_args(argv)
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    todo = steps(out, args.device, args.small)
    skip_what_cannot_run(todo)
    shares = sum(step.share_s for step in todo if step.outcome == NOT_STARTED)
    due = time.monotonic()
    for step in todo:
        if step.outcome == NOT_STARTED:
            due += args.seconds * step.share_s / shares
            run(step, out, due - time.monotonic())
        print(f"== {step.name}: {step.outcome}, {step.seconds} s", flush=True)
        log = out / f"{step.name}.txt"
        if step.seconds is not None:
            print("\n".join(log.read_text().splitlines()[-60:]), flush=True)
    summary = {step.name: {"seconds": step.seconds, "outcome": step.outcome} for step in todo}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return int(any(not step.outcome.startswith(("passed", SKIPPED)) for step in todo))


if __name__ == "__main__":
    sys.exit(main())
