"""Secrets stay out of everything that is written: files, logs, errors, trackers."""

from .known import MASK, known_secrets, masked_known
from .mask import find_mask, learn, masked, masked_argv, masked_errors, masked_values, shown
from .names import is_secret_name

__all__ = [
    "MASK",
    "find_mask",
    "is_secret_name",
    "known_secrets",
    "learn",
    "masked",
    "masked_argv",
    "masked_errors",
    "masked_known",
    "masked_values",
    "shown",
]
