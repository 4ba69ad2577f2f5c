"""Curriculum: prompts whose groups taught nothing come less often."""

from __future__ import annotations

from typing import Any

import torch

from .seeds import step_seed


class Curriculum:
    """Prompt i comes in epoch e if  u(seed, e, i) < w_i.

        w_i = 1        the newest group of prompt i had signal, or there is none yet
        w_i = chance   it had none: all completions were right, or all wrong, or it was filtered out

    u is uniform in [0, 1) and follows from (seed, e, i), so that such a prompt comes once in
    1 / chance epochs on average, and every epoch after it has had signal again. If fewer than
    `at_least` rows come, those with the smallest u are added.
    """

    def __init__(self, num_rows: int, chance: float, seed: int):
        self.chance, self.seed = chance, seed
        self._no_signal = torch.zeros(num_rows, dtype=torch.bool)

    def note(self, row: int, *, has_signal: bool) -> None:
        self._no_signal[row] = not has_signal

    def resting(self, epoch: int, order: list[int], at_least: int) -> frozenset[int]:
        """The rows of `order` that do not come in this epoch."""
        candidates = [row for row in order if self._no_signal[row]]
        draws = {row: step_seed(self.seed, epoch, row) / 2**63 for row in candidates}
        resting = [row for row in candidates if draws[row] >= self.chance]
        resting.sort(key=lambda row: draws[row])
        num_short = max(0, at_least - (len(order) - len(resting)))
        return frozenset(resting[num_short:])

    def state_dict(self) -> dict[str, Any]:
        return {"no_signal": self._no_signal.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._no_signal = state["no_signal"].clone()
