"""memory/*: the most that a run has taken."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator

from rloo_fast.reports import peak_memory as module
from rloo_fast.reports.peak_memory import peak_memory


def test_the_host_peak_is_the_systems(tmp_path):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t 3145728 kB\nVmRSS:\t 1024 kB\n")
    assert peak_memory(Accelerator(cpu=True), status) == {"memory/host_gib": 3.0}


def test_the_peak_outlasts_what_caused_it():
    before = peak_memory(Accelerator(cpu=True))["memory/host_gib"]
    block = torch.ones(2**28)  # 1 GiB
    del block
    after = peak_memory(Accelerator(cpu=True))["memory/host_gib"]
    assert after >= before
    assert after > 1


def test_a_system_that_does_not_say_gives_nothing(tmp_path):
    assert math.isnan(peak_memory(Accelerator(cpu=True), tmp_path / "none")["memory/host_gib"])


def test_of_a_gpu_it_is_what_torch_counts(monkeypatch):
    device = torch.device("cuda", 1)
    counted = {"max_memory_allocated": 2**30, "max_memory_reserved": 2**31}
    for name, value in counted.items():
        monkeypatch.setattr(torch.cuda, name, lambda at, value=value: value * (at == device))
    monkeypatch.setattr(module, "gather_rows", lambda accelerator, mine: mine)
    accelerator: Any = SimpleNamespace(device=device)
    found = peak_memory(accelerator)
    assert (found["memory/device_gib"], found["memory/reserved_gib"]) == (1, 2)
