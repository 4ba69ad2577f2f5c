"""Peak memory of one call on the CPU, in a fresh process per provider.

    extra = peak resident memory during the call - resident memory just before it

Inputs are loaded, hence touched, before the baseline is taken. Whatever the call must leave to its
caller counts for every provider alike: for a loss that is the gradient of each leaf. The step runs
once before the baseline (compilation, thread pools, library buffers), its garbage is collected, and
the heap's free pages are given back, so that they cannot serve the measured call unseen.
The process is fresh because a parent's heap holds pages that earlier providers left behind.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULT = "peak_extra_mem_mib="


class NotMeasured(Exception):
    """Why there is no figure."""


def cpu_peak_extra_mib(target: str, arguments: dict[str, object]) -> float:
    """MiB that one call of the step holds beyond its inputs; `target` is "module:function".

    In the child, `function(**arguments)` sets the inputs up and returns the step, a callable
    without arguments. Raises NotMeasured where the system cannot tell or the child fails.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "benchmarks.common.memory", target, json.dumps(arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    for line in done.stdout.splitlines():
        if line.startswith(RESULT):
            return float(line.removeprefix(RESULT))
    last = done.stderr.strip().splitlines()[-1:] or ["no message"]
    raise NotMeasured(f"the memory process ended with {done.returncode}: {last[0]}")


def measure(step: Callable[[], object]) -> float:
    """`extra` of the module's docstring for one call of `step` in this process, in MiB."""
    del_me = step()
    del del_me
    gc.collect()
    _give_free_pages_back()
    before = _status_kib("VmRSS")
    _reset_peak()
    out = step()
    peak = _status_kib("VmHWM")
    del out
    return max(peak - before, 0) / 1024


def _give_free_pages_back() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        raise NotMeasured("this C library has no malloc_trim")
    trim(0)


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5: VmHWM := VmRSS
    except OSError as error:
        raise NotMeasured(f"/proc/self/clear_refs cannot be written: {error}") from error


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise NotMeasured(f"/proc/self/status has no {field}")


def main() -> None:
    target, arguments = sys.argv[1], json.loads(sys.argv[2])
    module, _, function = target.partition(":")
    step = getattr(importlib.import_module(module), function)(**arguments)
    print(f"{RESULT}{measure(step):.6f}")


if __name__ == "__main__":
    main()
