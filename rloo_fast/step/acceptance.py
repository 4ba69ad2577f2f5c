"""How many prompts to ask for, so that enough of their groups have signal."""

from __future__ import annotations

import math
from typing import Any

MEMORY = 0.9  # weight of a generation batch's counts in the estimate of the next one


class Acceptance:
    """p = (1 + accepted) / (1 + sampled): 1 before anything is known, and prompts of earlier
    generation batches weigh MEMORY less with each batch, as the policy changes."""

    def __init__(self) -> None:
        self.accepted, self.sampled = 0.0, 0.0

    @property
    def rate(self) -> float:
        return (1 + self.accepted) / (1 + self.sampled)

    def begin_batch(self) -> None:
        self.accepted, self.sampled = MEMORY * self.accepted, MEMORY * self.sampled

    def note(self, *, accepted: int, sampled: int) -> None:
        self.accepted, self.sampled = self.accepted + accepted, self.sampled + sampled

    def num_prompts(self, needed: int, at_most: int) -> int:
        """Of n prompts, n p +- sqrt(n p (1 - p)) groups are accepted. With

            n = (needed + sqrt(needed (1 - p))) / p

        they suffice in about five of six cases; what is more than needed is kept.
        """
        p = self.rate
        wanted = math.ceil((needed + math.sqrt(needed * (1 - p))) / p)
        return max(needed, min(wanted, at_most))

    def state_dict(self) -> dict[str, Any]:
        return {"accepted": self.accepted, "sampled": self.sampled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accepted, self.sampled = state["accepted"], state["sampled"]
