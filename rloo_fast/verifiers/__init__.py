"""A model's answer in, what a third-party verifier makes of it out, from a process one can kill."""

from .pool import Verifiers, close_verifiers, shared_verifiers
from .worker import NoProcess, OverLimit, VerifierError

__all__ = [
    "NoProcess",
    "OverLimit",
    "VerifierError",
    "Verifiers",
    "close_verifiers",
    "shared_verifiers",
]
