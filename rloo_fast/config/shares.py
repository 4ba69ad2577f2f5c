"""A share of the GPU's memory that was left out, told from one that was given."""

from __future__ import annotations


class DefaultShare(float):
    """The default of a field that nobody set: a float to everyone else."""


def given_share(share: float) -> float | None:
    """The share, or None where it was left out."""
    return None if isinstance(share, DefaultShare) else share
