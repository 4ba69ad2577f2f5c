"""What has become of every prompt that a run has drawn, by its number in the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from enum import IntEnum
from typing import Any

import torch


class Fate(IntEnum):
    """Where a prompt is. TRAINED and REPLACED are final: no prompt is trained twice."""

    IN_FLIGHT = 0  # drawn; its completions are being sampled or scored
    QUEUED = 1  # its group waits for a generation batch
    TRAINED = 2  # its group is in a generation batch, of which the step takes every row once
    REPLACED = 3  # its group was turned down, and another prompt was drawn in its place


FINAL = (Fate.TRAINED, Fate.REPLACED)


class Ledger:
    """A Fate per prompt drawn, one byte each. It goes into checkpoints: after a kill, what was
    trained is not trained again, and what was not is."""

    def __init__(self) -> None:
        self._fates = bytearray()

    def __len__(self) -> int:
        """Prompts drawn so far; the next one gets this number."""
        return len(self._fates)

    def draw(self) -> int:
        """The number of one more prompt, in flight."""
        self._fates.append(Fate.IN_FLIGHT)
        return len(self._fates) - 1

    def mark(self, numbers: Iterable[int], fate: Fate) -> None:
        for number in numbers:
            before = Fate(self._fates[number])
            assert before not in FINAL, f"prompt {number} is {before.name}, now {fate.name}"
            self._fates[number] = fate

    def fate(self, number: int) -> Fate:
        return Fate(self._fates[number])

    def unfinished(self) -> list[int]:
        """Numbers in flight or queued, ascending."""
        return [number for number, fate in enumerate(self._fates) if fate not in FINAL]

    def counts(self) -> dict[Fate, int]:
        found = Counter(self._fates)
        return {fate: found[fate] for fate in Fate}

    def state_dict(self) -> dict[str, Any]:
        fates = torch.empty(len(self), dtype=torch.uint8)
        fates.numpy()[:] = memoryview(self._fates)
        return {"fates": fates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._fates = bytearray(state["fates"].numpy().tobytes())
