"""Updates whose gradient is not finite: skipped, counted, and the end of a run where they go on."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

logger = logging.getLogger(__name__)


class NonfiniteSteps:
    """Decides from the norm of a step's gradient whether the optimizer may use it.

    The run ends with FloatingPointError at `max_in_a_row` such steps one after another.
    """

    def __init__(self, max_in_a_row: int):
        self.max_in_a_row = max_in_a_row
        self.grad_norm = 0.0  # of the step whose gradient is ready; set before the update
        self.num_skipped = 0
        self.num_in_a_row = 0

    def must_skip(self) -> bool:
        if math.isfinite(self.grad_norm):
            self.num_in_a_row = 0
            return False
        return True

    def skip(self, step: int, scaler: torch.amp.GradScaler | None) -> None:
        """Count the skipped update of `step`; raises FloatingPointError at too many in a row.

        In fp16 an overflow is the loss scale's fault, which is lowered now, until it is at 1.
        """
        self.num_skipped += 1
        logger.warning(
            "Step %d: the gradient is not finite (norm %s); the update is skipped.",
            *(step, self.grad_norm),
        )
        if scaler is not None and scaler.get_scale() > 1:
            return
        self.num_in_a_row += 1
        if self.num_in_a_row >= self.max_in_a_row:
            raise FloatingPointError(
                f"{self.num_in_a_row} steps in a row had a loss or gradient that is not finite: "
                "lower learning_rate or max_grad_norm, or look at the rewards. "
                "max_nonfinite_steps sets how many are let pass."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"num_skipped_steps": self.num_skipped, "num_nonfinite_steps": self.num_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_skipped = state["num_skipped_steps"]
        self.num_in_a_row = state["num_nonfinite_steps"]
