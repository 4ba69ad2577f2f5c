"""Whether the CUDA side of a run works, on one GPU in at most 20 minutes (`make gpu-smoke`).

    limit   part
     60 s   allocator             (a) vLLM's sleep mode beside the tensors of a trainer
     60 s   allocator_expandable      the same with torch's expandable segments
    150 s   room                  (b) a trainer's state of 1.5B parameters to the host and back
     90 s   ddp                   (c) two processes on the GPU: what the memory plan counts
    180 s   start                 (d) vLLM started twice: the process's settings stay
    150 s   rollout               (e) tokens per second, with and without seeds
    150 s   sampler_check         (f) noise, and weights that are stale, in bfloat16
    270 s   training              (g) a run that is killed and resumed
     90 s   transfer              (h) weights to a server on another GPU; skipped where there is one

Each is a process with its own limit of time: a part that crashes, hangs or runs out of memory is a
result, and the next one runs. FOLDER/gpu_smoke.json has the machine, the versions, and per part its
status (ok, failed, skipped), a reason, and every figure beside its limit; FOLDER/log.txt what the
parts printed. Needs this repository, torch >= 2.11, triton >= 3.6 and transformers >= 5.16. What a
part needs besides and is not installed is said in its reason. Without vLLM, (e), (f) and (g) sample
with transformers. `--dry` runs the parts on the CPU, with tiny shapes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.harness import environment
from benchmarks.gpu_check import TRAINER_NEEDS

from .limits import judged

ROOT = Path(__file__).resolve().parents[2]
ENGINE_NEEDS = ("accelerate",)  # what rloo_fast.rollout imports
LONGEST_TAIL = 30  # lines of a failed part's output that are kept as its reason


@dataclass(frozen=True)
class Part:
    """`limit_s`: after which it is stopped. `needs`: packages; `gpu_needs`: those, but for --dry.
    `module`: what is run, with the options of `part.py`."""

    name: str
    limit_s: float
    needs: tuple[str, ...] = ()
    gpu_needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    module: str = "benchmarks.gpu_smoke.part"


PARTS = (
    Part("allocator", 60, gpu_needs=("vllm",)),
    Part(
        "allocator_expandable", 60, gpu_needs=("vllm",),
        environment={"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
    ),
    Part("room", 150),
    Part("ddp", 90, ENGINE_NEEDS),
    Part("start", 180, (*ENGINE_NEEDS, "vllm")),
    Part("rollout", 150, ENGINE_NEEDS),
    Part("sampler_check", 150, ENGINE_NEEDS),
    Part("training", 270, (*TRAINER_NEEDS, "reasoning_gym")),
    Part("transfer", 90, ENGINE_NEEDS),
)  # fmt: skip


def machine() -> dict[str, Any]:
    """Hardware, driver, versions and commit."""
    found = {**environment(), "driver": None, "gpu_memory_gib": None}
    if torch.cuda.is_available():
        found["gpu_memory_gib"] = round(torch.cuda.mem_get_info()[1] / 2**30, 1)
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with suppress(OSError, subprocess.TimeoutExpired):  # a container may come without it
            done = subprocess.run(asked, capture_output=True, text=True, timeout=30)
            found["driver"] = done.stdout.split("\n")[0].strip() or None
    return found


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def run_part(part: Part, *, dry: bool, engine: str, limit_s: float, log: Any) -> dict[str, Any]:
    """The part's row of the JSON."""
    missing = [
        name for name in (*part.needs, *(() if dry else part.gpu_needs)) if not is_installed(name)
    ]
    if missing:
        reason = f"not installed: {', '.join(missing)}"
        return {"status": "skipped", "reason": reason, "seconds": None, "figures": {}}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-smoke-") as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, "-m", part.module, part.name, "--json", str(result)]
        command += ["--folder", str(Path(folder, "work")), "--engine", engine]
        command += ["--limit-s", str(limit_s)]
        ended, printed = _run(command + ["--dry"] * dry, part.environment, limit_s, log)
        found = json.loads(result.read_text()) if result.exists() else {}
    status, reason = found.get("status", "stopped"), found.get("reason")
    figures = judged(part.name, found.get("figures", {}))
    outside = [name for name, row in figures.items() if row.get("pass") is False]
    if status == "stopped" or (ended and status != "failed"):
        status, reason = "failed", ended or "the process ended before its result"
    if status == "failed":
        reason = f"{reason}\n{printed}"
    elif status == "ok" and outside:
        status, reason = "failed", f"outside their limits: {', '.join(outside)}"
    seconds = round(time.monotonic() - start, 1)
    return {"status": status, "reason": reason, "seconds": seconds, "figures": figures}


def _run(command: list[str], variables: dict[str, str], limit_s: float, log: Any) -> tuple:
    """(how it ended, "" if well; the end of what it printed). Its processes end with it."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    known = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    begin = log.tell()
    process = subprocess.Popen(
        command, cwd=ROOT, env=known | variables, stdout=log, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        code = process.wait(limit_s)
        ended = f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
        ended = "" if code == 0 else ended
    except subprocess.TimeoutExpired:
        ended = f"stopped after {limit_s:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started as well
        process.wait()
    log.seek(begin)
    lines = log.read().decode(errors="replace").splitlines()
    log.seek(0, os.SEEK_END)
    return ended, "\n".join(lines[-LONGEST_TAIL:])


def main(argv: list[str] | None = None) -> int:
    """0 if no part failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_smoke", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = [part.name for part in PARTS]
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-smoke"), help="for the results")
    parser.add_argument("--parts", default=",".join(names), help="of these, with commas between")
    parser.add_argument("--seconds", type=float, default=1200, help="for all parts together")
    parser.add_argument("--engine", choices=("auto", "vllm", "hf"), default="auto")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny shapes")
    args = parser.parse_args(argv)
    if unknown := sorted({*args.parts.split(",")} - {*names}):
        parser.error(f"--parts: {', '.join(unknown)} is none of {', '.join(names)}")
    if not args.dry and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --dry tries the parts on the CPU")
    engine = ("vllm" if is_installed("vllm") else "hf") if args.engine == "auto" else args.engine
    args.out.mkdir(parents=True, exist_ok=True)
    due = time.monotonic() + args.seconds
    summary: dict[str, Any] = {"env": machine(), "dry": args.dry, "engine": engine, "parts": {}}
    with (args.out / "log.txt").open("w+b") as log:
        for part in (p for p in PARTS if p.name in args.parts.split(",")):
            left = min(part.limit_s, due - time.monotonic())
            row = run_part(part, dry=args.dry, engine=engine, limit_s=max(left, 1), log=log)
            summary["parts"][part.name] = row
            text = json.dumps(_finite(summary), indent=1, allow_nan=False)
            (args.out / "gpu_smoke.json").write_text(text + "\n")
            show(part.name, row)
    return int(any(row["status"] == "failed" for row in summary["parts"].values()))


def show(name: str, row: dict[str, Any]) -> None:
    reason = f": {row['reason']}" if row["reason"] else ""
    print(f"== {name}: {row['status']}, {row['seconds']} s{reason}", flush=True)
    for figure, found in row["figures"].items():
        value = found["value"]
        said = {True: "pass", False: "FAIL", None: ""}[found.get("pass")]
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"   {figure:<28}{shown!s:>14}  {found.get('limit', ''):<14}{said}", flush=True)


def _finite(value: Any) -> Any:
    """NaN and infinities as texts: JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value
