"""Everything that needs a GPU, in one command of at most nine minutes (`make gpu-check`).

    python -m benchmarks.gpu_check --out FOLDER

1. numerics: every op against float64 on the device, all dtypes, both ways to the logits
2. logits: the logits-in ops against the measured copy bandwidth, and their peers
3. linear: the fused loss at the four shapes against 6NDV at the measured rate, and its peers
4. tiles: the matrix kernel's tiles against the library's product

Each step is a process with what is left of the time; its JSON and its output go to FOLDER, and
`summary.json` says which steps ran. Needs this repository, torch >= 2.11 and triton >= 3.6; peers
that are not installed get a row that says so. A step that fails does not stop the next.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOUR_SHAPES = ["pythia-410m", "pythia-1b", "qwen2.5-0.5b", "qwen2.5-7b"]


@dataclass
class Step:
    """One process: its module's arguments, and the most seconds it may take."""

    name: str
    module: str
    arguments: list[str]
    most_s: float
    seconds: float | None = None
    outcome: str = "not started"


def steps(out: Path, device: str, small: bool) -> list[Step]:
    """The four steps; `small` shrinks them so that a CPU can try the script itself."""
    vocab = "503" if small else "50257,50304,151936"
    rows = ["--rows", "256", "--runs", "1"] if small else ["--rows", "16384", "--runs", "10"]
    two = ["256,16,503"] if small else ["pythia-410m", "qwen2.5-0.5b"]
    four = ["256,16,503"] if small else FOUR_SHAPES
    common = ["--device", device, "--dtype", "float32" if small else "bfloat16"]

    def shapes(names: list[str]) -> list[str]:
        return [part for name in names for part in ("--shape", name)]

    def json_of(name: str) -> list[str]:
        return ["--json", str(out / f"{name}.json")]

    providers = ["--providers", "ours,eager"] if small else []
    found = [
        Step(
            "numerics",
            "benchmarks.numerics",
            ["--device", device, "--vocab", vocab, *json_of("numerics")],
            120,
        ),
        Step(
            "logits",
            "benchmarks.loss",
            ["--job", "logits", *common, *rows, *shapes(two), *providers, *json_of("logits")],
            150,
        ),
        Step(
            "linear",
            "benchmarks.loss",
            ["--job", "linear", *common, *rows, *shapes(four), *providers, *json_of("linear")],
            240,
        ),
    ]
    if device == "cuda":
        found.append(Step("tiles", "benchmarks.tiles", [*shapes(four), *json_of("tiles")], 120))
    return found


def run(step: Step, out: Path, seconds_left: float) -> None:
    limit = min(step.most_s, seconds_left)
    if limit < 10:
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
    """0 if every step passed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", default="runs/gpu-check", help="folder for the results")
    parser.add_argument("--seconds", type=float, default=520, help="for all steps together")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes: try the script itself")
    args = parser.parse_args(argv)
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.seconds
    todo = steps(out, args.device, args.small)
    for step in todo:
        run(step, out, deadline - time.monotonic())
        print(f"== {step.name}: {step.outcome}, {step.seconds} s", flush=True)
        log = out / f"{step.name}.txt"
        if log.exists():
            print("\n".join(log.read_text().splitlines()[-60:]), flush=True)
    summary = {step.name: {"seconds": step.seconds, "outcome": step.outcome} for step in todo}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return int(any(step.outcome != "passed" for step in todo))


if __name__ == "__main__":
    sys.exit(main())
