"""Prompts and a set of tools for each in, whole conversations out: turns of the policy, and between
them what its tools answered.

`TrajectorySampler` asks an engine for a turn of every conversation that waits for one. A turn's
prompt is the token ids so far and those of what is new, so that a token that was sampled is trained
on as it was: see `template.py`.
"""

from .conversation import Language, Limits
from .rows import trajectory_rows
from .sampler import Generate, TrajectorySampler

__all__ = ["Generate", "Language", "Limits", "TrajectorySampler", "trajectory_rows"]
