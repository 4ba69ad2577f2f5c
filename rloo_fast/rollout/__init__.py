"""Stage 2: prompts and a seed for each in, completions with the sampler's log-probs out."""

from .engine import RolloutEngine
from .hf import HFEngine
from .registry import find_engine, register_engine
from .settings import EngineSettings

__all__ = ["EngineSettings", "HFEngine", "RolloutEngine", "find_engine", "register_engine"]
