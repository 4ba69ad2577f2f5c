"""Seeds of single draws, from the run's seed and the place of the draw in the run."""

from __future__ import annotations

import hashlib


def step_seed(seed: int, *keys: int) -> int:
    """63 bits of BLAKE2b over (seed, *keys): the same on every process and machine."""
    digest = hashlib.blake2b(repr((seed, *keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
