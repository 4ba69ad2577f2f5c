"""The most memory that a run has taken so far."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from accelerate import Accelerator

from ..distributed.collectives import gather_rows

GIB = 2**30
STATUS = Path("/proc/self/status")


def peak_memory(accelerator: Accelerator, status: Path = STATUS) -> dict[str, float]:
    """GiB by metric, each of the process that had most; every process must call.

    memory/device_gib, memory/reserved_gib: what torch had allocated on the GPU, and reserved of it;
    what a vLLM engine in the process takes past torch is missing. memory/host_gib: resident memory
    of the process, NaN where the system does not say. Nothing is reset, as others measure too.
    """
    found = {"memory/host_gib": _host_bytes(status) / GIB}
    if accelerator.device.type == "cuda":
        found["memory/device_gib"] = torch.cuda.max_memory_allocated(accelerator.device) / GIB
        found["memory/reserved_gib"] = torch.cuda.max_memory_reserved(accelerator.device) / GIB
    mine = {name: torch.tensor([value]) for name, value in found.items()}
    return {name: each.max().item() for name, each in gather_rows(accelerator, mine).items()}


def _host_bytes(status: Path) -> float:
    try:
        known = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
    except OSError:  # not on Linux
        known = None
    return 1024.0 * int(known[1]) if known else float("nan")
