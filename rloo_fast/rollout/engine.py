"""What a rollout engine offers the trainer."""

from __future__ import annotations

import hashlib
from typing import Protocol

from ..types import Rollout, Sampling


class RolloutEngine(Protocol):
    """Samples completions from the policy's current weights."""

    def generate(self, prompt_ids: list[list[int]], sampling: Sampling, seed: int) -> Rollout:
        """One completion per entry of `prompt_ids`, in order; the same seed, the same completions.

        Leaves the global random state as it was.
        """
        ...


def step_seed(seed: int, *keys: int) -> int:
    """A 63-bit seed from the run's seed and where in the run a draw stands; the same everywhere."""
    digest = hashlib.blake2b(repr((seed, *keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
