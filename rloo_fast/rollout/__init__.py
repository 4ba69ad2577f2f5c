"""Stage 2: prompts -> completions."""

from .engine import RolloutEngine
from .hf import HFEngine

__all__ = ["HFEngine", "RolloutEngine"]
