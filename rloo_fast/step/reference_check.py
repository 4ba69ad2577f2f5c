"""The reference against the policy before any update: they are one, so that their KL is 0."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# largest |KL| per token that rounding makes; of float32 a GPU's matrix products keep 10 bits only
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
TOLERANCE[torch.float8_e4m3fn] = 0.1  # of the reference's head: `python -m benchmarks.fp8`
TOLERANCE_GPU = 0.01


class ReferenceMismatch(RuntimeError):
    """The reference is not the policy as it was passed in; the message says how far off."""


class ReferenceCheck:
    """Judges the first step of a run by sum_i |KL_i| / sum_i tokens_i over its rows.

    `dtype`: the coarsest that the model computes in. `beta` 0: there is no reference. `stops`:
    raise, rather than warn. `has_dropout`: the policy's log-probs may hold noise, which is only
    judged where a pass without dropout made them.
    """

    def __init__(
        self,
        *,
        beta: float,
        dtype: torch.dtype,
        device: torch.device,
        stops: bool,
        has_dropout: bool,
    ):
        self.tolerance = TOLERANCE.get(dtype, max(TOLERANCE.values()))
        if device.type != "cpu":
            self.tolerance = max(self.tolerance, TOLERANCE_GPU)
        self.stops, self.has_dropout = stops, has_dropout
        self.is_over = beta == 0

    def judge(self, rows: dict[str, Tensor], step: int) -> None:
        """To be called before the optimizer acts; `rows`: of all processes, so that all agree.

        `step`: updates so far, those of a run that is resumed included.
        """
        if self.is_over or (self.has_dropout and "old_entropy" not in rows):
            return
        self.is_over = True
        ran = rows["kl"].isfinite()
        num_tokens = int(rows["tokens"][ran].sum())
        if step > 0 or not num_tokens:
            return
        off = float(rows["kl"][ran].abs().sum()) / num_tokens
        if off <= self.tolerance:
            return
        found = (
            f"before any update the KL of the policy to its reference is {off:.3g} nats per token, "
            f"and should be 0 (rounding: {self.tolerance:g}): the reference is not the policy as "
            "it was passed in. Were its weights changed after the trainer was made, change them "
            "before; does it draw random numbers in training, switch that off; else set beta=0."
        )
        if self.stops:
            raise ReferenceMismatch(f"{found} logp_diff_stop=0 goes on with a warning.")
        logger.warning(found)
