"""What a rollout engine offers the trainer."""

from __future__ import annotations

import hashlib
from typing import Protocol

from ..config import RLOOConfig, as_dict
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


def sampling_of(args: RLOOConfig, stop_token_ids: tuple[int, ...]) -> Sampling:
    """How a configuration wants its completions drawn."""
    extra = as_dict(args.generation_kwargs)
    if args.cache_implementation is not None:
        extra.setdefault("cache_implementation", args.cache_implementation)
    return Sampling(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k or 0,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        max_new_tokens=args.max_completion_length,
        stop_token_ids=stop_token_ids,
        extra=extra,
    )
