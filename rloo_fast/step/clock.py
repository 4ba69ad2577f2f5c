"""Seconds of an optimizer step and of its stages."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepClock:
    """Times one optimizer step after another on `device`.

    stages: seconds by stage of the step under way; step_s: of the newest whole step; run_s: from
    the start of this run's first step to the end of the newest, None before the second one.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stages: dict[str, float] = defaultdict(float)
        self.step_s = 0.0
        self.run_s: float | None = None
        self._step_start = 0.0
        self._run_start: float | None = None
        self._optimizer_start = 0.0

    def begin_step(self) -> None:
        self._step_start = time.perf_counter()
        self.stages.clear()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to stage `name` of the step."""
        start = time.perf_counter()
        yield
        self._wait_for_device()
        self.stages[name] += time.perf_counter() - start

    def add(self, name: str, seconds: float) -> None:
        """Seconds that were measured elsewhere."""
        self.stages[name] += seconds

    def begin_optimizer(self) -> None:
        self._optimizer_start = time.perf_counter()

    def end_step(self) -> None:
        """Right after the optimizer, whose stage ends with the step."""
        self._wait_for_device()
        now = time.perf_counter()
        self.stages["optimizer"] = now - self._optimizer_start
        self.step_s = now - self._step_start
        if self._run_start is None:
            self._run_start = self._step_start
        else:
            self.run_s = now - self._run_start

    def _wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
